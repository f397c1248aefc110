"""Render a report as one HTML page that needs no other file.

Jinja escapes every text. The page's own policy also allows only its two scripts, by their hashes, and loads nothing.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files

import jinja2
import plotly
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from gcvit import __version__
from gcvit.report import config_diff, evaluation, published, samples, step_time, summary, timeline, training
from gcvit.report.charts import PALETTE, Chart, night_of_day
from gcvit.report.run_data import Record


def render(records: Sequence[Record]) -> str:
    """Render the whole page."""
    several = len(records) > 1
    scale = training.choose_scale(records)
    stages = [step_time.draw_stages(record, scale, several) for record in records]
    details = [
        evaluation.describe(record, index, found, several)
        for index, record in enumerate(records)
        for found in record.evaluations
    ]
    package = files("gcvit.report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (package / name).read_text()),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plot_script, page_script = get_plotlyjs(), (package / "page.js").read_text()
    assert "</script" not in plot_script + page_script
    return environment.get_template("page.html").render(
        policy=" ".join(f"'sha256-{_hash(script)}'" for script in (plot_script, page_script)),
        plot_script=Markup(plot_script),
        page_script=Markup(page_script),
        style=Markup(_write_palette() + (package / "page.css").read_text()),
        night=to_json(night_of_day()),
        figure_json=lambda chart: to_json(_as_plain(chart)),
        records=records,
        colors={record.name: training.run_color(index) for index, record in enumerate(records)},
        summaries=[summary.summarize(record, training.run_color(index)) for index, record in enumerate(records)],
        scale=scale,
        curves=training.draw_curves(records),
        missing_curves=[training.find_missing(record) for record in records],
        stages=[chart for chart in stages if chart is not None],
        unstaged=[record.name for record, chart in zip(records, stages, strict=True) if chart is None],
        timeline=timeline.draw_timeline(records),
        untimed=timeline.find_untimed(records),
        events=[(record.name, timeline.list_events(record)) for record in records],
        evaluations=evaluation.tabulate(records),
        details=details,
        unevaluated=[record.name for record in records if not record.evaluations],
        samples=[shown for record in records for shown in samples.show_samples(record, several)],
        unsampled=[record.name for record in records if not record.samples],
        comparison=published.draw_comparison(records),
        comparison_notes=published.describe_comparison(records),
        published=published.tabulate_published(),
        sources=published.list_sources(),
        differences=config_diff.tabulate_differences(records) if several else None,
        hardware=config_diff.describe_hardware(records),
        unstarted=[record.name for record in records if not record.of_kind("start")],
        changes=[(record.name, config_diff.list_changes(record)) for record in records],
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=__version__,
        plotly_version=plotly.__version__,
    )


def to_json(value: object) -> Markup:
    """Encode JSON that is safe inside of a `<script>` or an attribute."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&'":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _as_plain(chart: Chart) -> object:
    figure = chart.figure.to_plotly_json()
    return json.loads(json.dumps(figure, cls=plotly.utils.PlotlyJSONEncoder))


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _write_palette() -> str:
    day, night = ("".join(f"--{name}:{tones[i]};" for name, tones in PALETTE.items()) for i in (0, 1))
    return (
        f":root{{{day}color-scheme:light}}\n:root[data-theme=night]{{{night}color-scheme:dark}}\n"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=day]){{{night}color-scheme:dark}}}}\n"
    )
