"""Write a report of one or several runs: one HTML file that opens offline.

    python -m gcvit.report runs/demo-fsdp
    python -m gcvit.report runs/small runs/small-lr2 --out comparison.html

It reads the files of the runs (config, metrics.jsonl, evaluations/, samples/) and computes nothing anew. The report of
a run that is still training works, too.
"""

import argparse
from pathlib import Path

from gcvit.errors import UserError
from gcvit.runtime.atomic_write import write_text
from gcvit.runtime.command_line import command_parser
from gcvit.runtime.entrypoint import run_main

REPORT_FILE = "report.html"


def parse_arguments() -> argparse.Namespace:
    parser = command_parser("gcvit.report", "RUN... [flags]", __doc__)
    runs = parser.add_argument_group("what to report")
    runs.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="a run's folder, runs/TAG; several are compared"
    )
    results = parser.add_argument_group("results")
    results.add_argument("--out", metavar="FILE", type=Path, help="the page; of one run, by default (RUN/report.html)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    out = arguments.out
    if out is None:
        if len(arguments.runs) > 1:
            raise UserError("where to write a report of several runs?", hint="add --out FILE")
        out = arguments.runs[0] / REPORT_FILE
    if out.is_dir():
        raise UserError("--out", got=f"{out}, a folder", expected="a file")
    try:
        from gcvit.report.page import render  # what draws is an extra
    except ModuleNotFoundError as error:
        if error.name not in ("plotly", "jinja2", "markupsafe"):
            raise
        raise UserError(f"a report needs {error.name}", hint="pip install plotly jinja2") from None
    from gcvit.report.charts import MAX_RUNS
    from gcvit.report.run_data import read_records

    if len(arguments.runs) > MAX_RUNS:
        raise UserError("more runs than colours", got=len(arguments.runs), expected=MAX_RUNS)
    page = render(read_records(arguments.runs))
    try:
        write_text(out, page, errors="backslashreplace")
    except OSError as error:
        hint = "give another --out"
        raise UserError("cannot write the report", got=f"{out} ({error.strerror})", hint=hint) from None
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_main(main)
