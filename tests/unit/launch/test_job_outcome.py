"""launch/job_outcome.py: how a job's processes ended, and what follows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "launch/job_outcome.py"
LOST = "RuntimeError: [gloo] Connection closed by peer [10.0.0.2]:1234"


def judge(folder: Path, *outcomes: tuple[str, str] | None, code: int = 1) -> tuple[int, str]:
    """Of two processes on each of n1 and n2, in the order of ranks; later ranks report first."""
    words = {"rank": 0, "step": 7, "exit": 0}
    for rank, outcome in enumerate(outcomes):
        if outcome:
            host = f"n{1 + rank // 2}"
            report = words | {"rank": rank, "outcome": outcome[0], "what": outcome[1], "host": host, "time": 9.0 - rank}
            (folder / f"rank_{rank}.json").write_text(json.dumps(report))
    command = [sys.executable, "-S", str(SCRIPT), str(folder), "2", str(code), "n1", "n2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode, done.stdout.strip()


FINISHED, LEFT, BROKE = ("finished", ""), ("preempted", "told"), ("failed", LOST)
CASES = [
    ([FINISHED] * 4, 0, "finished: all 4 processes"),
    ([LEFT] * 4, 75, "preempted: rank 3 on n2, after step 7: told"),
    ([LEFT, LEFT, LEFT, None], 75, "preempted: rank 2 on n2, after step 7: told; no report of rank 3 on n2"),
    ([LEFT, FINISHED, None, None], 75, "preempted: rank 0 on n1"),
    ([BROKE, ("user error", "bad key: got x"), BROKE, BROKE], 2, "a restart cannot mend it: rank 1 on n1"),
    ([BROKE, BROKE, BROKE, ("failed", "ValueError: 3")], 1, "crashed: rank 3 on n2, after step 7: ValueError: 3"),
    ([BROKE, None, BROKE, BROKE], 1, "killed without a word: rank 1 on n1; out of memory"),
    ([LEFT, BROKE, LEFT, None], 1, "killed without a word: rank 3 on n2; out of memory"),
    ([("hung", "no progress"), None, BROKE, BROKE], 1, "hung: rank 0 on n1, after step 7: no progress (1 of 4"),
    (
        [("hung", "x")] * 3 + [BROKE],
        1,
        "hung: rank 2 on n2, after step 7: x (3 of 4 processes say so); the cause may be rank 3",
    ),
    ([FINISHED, FINISHED, FINISHED, None], 1, "killed without a word: rank 3 on n2"),
    ([None] * 4, 1, "no process left a report, srun ended with 1: rank 0 on n1"),
]


@pytest.mark.parametrize(("outcomes", "code", "line"), CASES)
def test_the_cause_and_what_follows(tmp_path, outcomes, code, line):
    found = judge(tmp_path, *outcomes)
    assert found[0] == code
    assert found[1].startswith(line)


def test_a_half_written_report_is_none(tmp_path):
    (tmp_path / "rank_1.json").write_text("{")
    assert judge(tmp_path, FINISHED, None, FINISHED, FINISHED)[1].startswith("killed without a word: rank 1 on n1")


def test_the_first_word_of_the_others_is_told_too(tmp_path):
    """Where a network breaks, most ranks are killed, and one says why."""
    reports = [("failed", "DistBackendError: NCCL error: mlx5_2 port down"), None, None, None]
    line = judge(tmp_path, *reports)[1]
    assert line.startswith("killed without a word: rank 1 on n1, rank 2 on n2, rank 3 on n2; ")
    assert line.endswith("; the first word: rank 0 on n1, after step 7: DistBackendError: NCCL error: mlx5_2 port down")


def test_of_the_ranks_of_a_node_the_killed_one_is_named(tmp_path):
    """Its torchrun ends the others of its node, which leave no word either; those of another node are lost later."""
    for node, rank, code, time in ((0, 1, 1, 5.0), (1, 3, -9, 4.0)):
        content = {"rank": rank, "host": f"n{node + 1}", "exit": code, "time": time}
        (tmp_path / f"agent_{node}.json").write_text(json.dumps(content))
    code, line = judge(tmp_path, BROKE, BROKE, None, None)
    assert code == 1
    assert line.startswith("killed by SIGKILL: rank 3 on n2; out of memory")


def test_one_that_never_comes_to_a_step_is_no_mere_preemption(tmp_path):
    judge(tmp_path, LEFT, LEFT, LEFT, LEFT)
    for path in tmp_path.glob("rank_*"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"step": None}))
    found = judge(tmp_path)
    assert found == (1, "preempted: rank 3 on n2: told")
