"""Every end of a process leaves its report, with the exit code that tells a batch script whether to start again."""

import json

import pytest

from tests.helpers.launching import python

HEAD = """
import sys
from gcvit.runtime import heartbeat
from gcvit.errors import Preempted, UserError
from gcvit.runtime.entrypoint import run_main

def main():
    heartbeat.mark_step(5)
    {}

run_main(main)
"""
ENDS = {
    "return": ("finished", 0, ""),
    "raise UserError('no', got='a\\nb')": ("user error", 2, "no: got a b"),
    # A server's file system that was away: a restart may help.
    "try: raise OSError(116, 'Stale file handle')\n    except OSError: raise UserError('cannot read')": (
        *("failed", 1, "cannot read"),
    ),
    "raise Preempted": ("preempted", 75, "preempted by SIGUSR1 or SIGTERM"),
    "raise ValueError('ours')": ("failed", 1, "ValueError: ours"),
    "raise KeyboardInterrupt": ("failed", -2, "KeyboardInterrupt"),
    "sys.exit(2)": ("user error", 2, "exit with 2"),
}


@pytest.mark.parametrize("body", ENDS)
def test_each_end_is_reported(tmp_path, body):
    outcome, code, what = ENDS[body]
    done = python("-c", HEAD.format(body), timeout=60, RANK="2", WORLD_SIZE="4", GCVIT_REPORT_DIR=str(tmp_path))
    assert done.returncode == code
    assert [path.name for path in tmp_path.iterdir()] == ["rank_2.json"]
    report = json.loads((tmp_path / "rank_2.json").read_text())
    assert (report["rank"], report["step"]) == (2, 5)
    assert (report["outcome"], report["exit"], report["what"]) == (outcome, max(code, 1) if code else 0, what)


def test_a_crash_names_rank_and_host_and_waits_for_nobody():
    body = "import atexit; atexit.register(print, 'late'); raise ValueError('ours')"
    done = python("-c", HEAD.format(body), timeout=60, RANK="2", WORLD_SIZE="4")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("failed (rank 2 on ")
    assert last.endswith("): ValueError: ours")


def test_a_report_that_cannot_be_written_changes_no_exit_code(tmp_path):
    done = python("-c", HEAD.format("raise Preempted"), timeout=60, GCVIT_REPORT_DIR=str(tmp_path / "none"))
    assert done.returncode == 75
    assert done.stderr.startswith(f"cannot write {tmp_path / 'none'}/rank_0.json: ")
