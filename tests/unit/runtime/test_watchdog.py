"""A process that shows no progress ends with 76 and its stacks; one that does is left alone."""

import json

from tests.helpers.launching import python

HEAD = """
import threading, time
from gcvit.runtime import heartbeat
from gcvit.runtime.watchdog import watchdog

def wait_for_nothing():
    time.sleep(1000)
"""


def run(body: str, **environment: str):
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    code = f"{HEAD}\nwith watchdog(0.3):\n{lines}\nprint('over')"
    return python("-c", code, timeout=60, **environment)


def test_a_process_that_hangs_tells_where(tmp_path):
    body = "heartbeat.mark_step(7)\nthreading.Thread(target=wait_for_nothing, daemon=True).start()\ntime.sleep(1000)"
    done = run(body, RANK="3", GCVIT_REPORT_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (76, "")
    report = json.loads((tmp_path / "rank_3.json").read_text())
    assert (report["outcome"], report["exit"], report["step"]) == ("hung", 76, 7)
    lines = done.stderr.splitlines()
    assert all(line.startswith(f"[rank 3 on {report['host']}] ") for line in lines), done.stderr
    assert lines[0].endswith("after step 7; the stacks of all threads:")
    assert sum("hread 0x" in line for line in lines) == 3
    assert any("in wait_for_nothing" in line for line in lines)


def test_before_the_first_step_it_is_more_patient():
    assert "before the first step" in run("time.sleep(1000)").stderr
    assert run("time.sleep(0.6)").stdout == "over\n"


def test_progress_of_any_thread_is_enough():
    body = """
heartbeat.mark_step(1)
def work():
    for _ in range(80):
        time.sleep(0.01)
        heartbeat.mark()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    assert run(body).stdout == "over\n"


def test_afterwards_nobody_watches():
    done = run("heartbeat.mark_step(1)\n")
    assert done.stdout == "over\n"
    code = f"{HEAD}\nwith watchdog(0.1):\n    heartbeat.mark_step(1)\ntime.sleep(0.5)\nprint('over')"
    assert python("-c", code, timeout=60).stdout == "over\n"
