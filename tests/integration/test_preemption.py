"""A run that is preempted at any moment saves, ends with 75, and resumes to the same result. Other ends are reported.

Trainings with slow steps, evaluations and writes get SIGUSR1 or SIGTERM at chosen moments, which their log names, and
start again until they are done. Reports tell apart a rank that hangs, one that is stopped and one that raises.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from gcvit.checkpoint.store import open_checkpoint
from gcvit.monitoring.schema import TIMED_KEYS
from tests.helpers.launching import ROOT, environment, python, succeed
from tests.helpers.trainings import Trainings, newest_step, read_rows, read_tensors_of, write_noise

pytestmark = pytest.mark.dist

STEPS = 8
OVERRIDES = [
    f"schedule.cosine={STEPS} steps",
    *("trainer.save_every=3 steps", "trainer.eval_every=2 steps", "global_batch_size=8", "trainer.eval_batch_size=2"),
]
ENGINES = {
    "ddp": ["engine=ddp"],
    "fsdp": ["engine=fsdp", "fsdp.unit_parameters=10000"],
    "zero2": ["engine=zero", "zero.stage=2"],
}
SLOW = {"step": 0.05, "evaluate": 0.05, "write": 0.3}
MOMENTS = ("begin", *SLOW)
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory) -> Iterator[Trainings]:
    root = tmp_path_factory.mktemp("preemption")
    write_noise(root)
    started = Trainings(root, root / "log", ["gcvit.parallel.zero"])  # DeepSpeed takes seconds to load
    yield started
    started.close()


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def send(processes: list[int], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def read_reports(folder: Path) -> list[dict]:
    """By rank; they are taken away."""
    found = []
    for path in sorted(folder.iterdir()):
        found.append(json.loads(path.read_text()))
        path.unlink()
    return found


# ---- preempted ----------------------------------------------------------------------------------


def train_and_preempt(
    trainings: Trainings, run_dir: Path, ranks: int, overrides: list[str], moment: str, chance: random.Random
) -> list[int]:
    """Start a training, tell it to leave at this moment or a little later; returns the exit codes."""
    begin = trainings.log.stat().st_size if trainings.log.exists() else 0
    reports = run_dir.parent / "reports"
    processes = trainings.start(run_dir, ranks, *overrides, slow=SLOW, environment={"GCVIT_REPORT_DIR": str(reports)})
    count = chance.randint(1, 3 * ranks)

    def is_there() -> bool:
        if trainings.has_ended():
            return True
        with open(trainings.log) as log:
            log.seek(begin)
            text = log.read()
        # A process takes the signals as a notice from its first moments on, but not before.
        return f"{run_dir.name}: gc_vit" in text if moment == "begin" else text.count(f"now: {moment}\n") >= count

    assert wait_for(is_there), trainings.end_of_log()
    time.sleep(chance.choice([0, chance.uniform(0, 0.2)]))
    number = chance.choice(SIGNALS)
    send(chance.choice([processes, processes[:1], processes[-1:]]), number)
    if chance.random() < 0.3:  # a second one changes nothing
        time.sleep(0.05)
        send(processes, chance.choice(SIGNALS))
    return trainings.exit_codes()


def preempt_and_resume(trainings: Trainings, root: Path, engine: str, ranks: int, num_tries: int) -> Counter[str]:
    """Tell one run after another to leave, `num_tries` times in all; each must end as the undisturbed one."""
    overrides, chance = [*OVERRIDES, *ENGINES[engine]], random.Random(f"{engine} {ranks}")
    reports, whole = root / "reports", root / "whole"
    reports.mkdir()
    trainings.start(whole, ranks, *overrides)
    assert trainings.exit_codes() == [0] * ranks, trainings.end_of_log()
    told: Counter[str] = Counter()
    moments: list[str] = []
    number = 0
    while told.total() < num_tries:
        run_dir, codes = root / f"told-{number}", [75]
        number += 1
        while any(codes) and told.total() < num_tries:
            moments = moments or chance.sample(MOMENTS, len(MOMENTS))
            moment, before = moments.pop(), newest_step(run_dir)
            codes = train_and_preempt(trainings, run_dir, ranks, overrides, moment, chance)
            told[f"{moment}: {'left' if codes[0] else 'finished'}"] += 1
            assert codes in ([75] * ranks, [0] * ranks), trainings.end_of_log()
            outcome = ("preempted", 75) if codes[0] else ("finished", 0)
            newest = newest_step(run_dir)
            # Before the first step there is nothing to save, nor in an evaluation that had been put off.
            assert newest > before or moment in ("begin", "evaluate") or not codes[0]
            assert not list((run_dir / "checkpoints").glob("*.tmp"))
            for rank, report in enumerate(read_reports(reports)):
                assert (report["rank"], report["outcome"], report["exit"]) == (rank, *outcome)
                assert report["step"] == (newest if newest > before else None)
        trainings.start(run_dir, ranks, *overrides)
        assert trainings.exit_codes() == [0] * ranks, trainings.end_of_log()
        check_equal(run_dir, whole)
    return told


def check_equal(run_dir: Path, whole: Path) -> None:
    """Bit-equal tensors, state and rows."""
    tensors, wanted = read_tensors_of(run_dir, STEPS), read_tensors_of(whole, STEPS)
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensors[name], tensor), f"{run_dir.name}: {name}"
    last = f"checkpoints/step_{STEPS:08d}"
    assert open_checkpoint(run_dir / last).state == open_checkpoint(whole / last).state
    assert numbers_of(run_dir) == numbers_of(whole)


def numbers_of(run_dir: Path) -> list[dict]:
    """The rows of steps and evaluations, but for when, and how quick, they were."""
    rows = [row for row in read_rows(run_dir) if row["kind"] not in ("start", "checkpoint", "end")]
    return [{name: value for name, value in row.items() if name not in TIMED_KEYS} for row in rows]


@pytest.mark.parametrize(("engine", "ranks"), [("ddp", 1), ("ddp", 2), ("fsdp", 2), ("zero2", 2)])
def test_a_preempted_run_ends_as_one_that_was_not(trainings, tmp_path, engine, ranks):
    print(dict(preempt_and_resume(trainings, tmp_path, engine, ranks, 2)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("engine", "ranks"), [("ddp", 1), ("ddp", 3), ("fsdp", 2), ("zero2", 2)])
def test_a_run_that_is_preempted_at_many_moments(trainings, tmp_path, engine, ranks):
    told = preempt_and_resume(trainings, tmp_path, engine, ranks, 16)
    print(dict(told))
    for moment in MOMENTS:
        assert told[f"{moment}: left"], told


@pytest.mark.parametrize("steps", [2, 3])
def test_an_evaluation_is_left_and_done_after_the_restart(steps, trainings, tmp_path):
    """At step 2, be it the last or not: the checkpoint says that it is due, and after the restart what it gave."""
    reports = tmp_path / "reports"
    reports.mkdir()
    overrides = [f"schedule.cosine={steps} steps", "trainer.eval_every=2 steps", "trainer.save_every=9 steps"]
    request = {"slow": {"evaluate": 0.3}, "environment": {"GCVIT_REPORT_DIR": str(reports)}}
    begin = trainings.log.stat().st_size if trainings.log.exists() else 0
    words = ["global_batch_size=8", "trainer.eval_batch_size=1", *overrides, *ENGINES["ddp"]]
    processes = trainings.start(tmp_path / "run", 2, *words, **request)
    assert wait_for(lambda: "now: evaluate" in trainings.log.read_text()[begin:]), trainings.end_of_log()
    send(processes[1:], signal.SIGTERM)
    assert trainings.exit_codes() == [75, 75], trainings.end_of_log()
    state = open_checkpoint(tmp_path / "run/checkpoints/step_00000002").state
    assert (state.evaluation_due, state.best_step) == (True, -1)
    assert not [row for row in read_rows(tmp_path / "run") if row["kind"].startswith("val/")]

    for _ in range(2):  # once
        trainings.start(tmp_path / "run", 2, *words, slow={"evaluate": 0.3})
        assert trainings.exit_codes() == [0, 0], trainings.end_of_log()
        state = open_checkpoint(tmp_path / "run/checkpoints/step_00000002").state
        assert (state.evaluation_due, state.best_step) == (False, 2)
        rows = read_rows(tmp_path / "run")
        evaluations = [row for row in rows if row["kind"].startswith("val/")]
        assert [row["step"] for row in evaluations] == [2, 2, 3, 3][: 2 * (steps - 1)]
    late = sum(row["seconds"] for row in evaluations[:2])
    after = [row["seconds"] for row in rows if row["kind"] == "train" and row["step"] == 3]
    assert all(seconds < late for seconds in after), "the late evaluation is on the clock"


# ---- other ends ----------------------------------------------------------------------------------


@pytest.fixture
def reports(tmp_path) -> Path:
    (tmp_path / "reports").mkdir()
    return tmp_path / "reports"


def start(trainings: Trainings, tmp_path: Path, reports: Path, **request) -> list[int]:
    words = [*OVERRIDES, *ENGINES["ddp"], "trainer.hang_timeout=4", "data.num_workers=0"]
    return trainings.start(tmp_path / "run", 2, *words, environment={"GCVIT_REPORT_DIR": str(reports)}, **request)


def test_a_rank_that_hangs_ends_all_with_their_stacks(trainings, tmp_path, reports):
    start(trainings, tmp_path, reports, fault={"kind": "hang", "rank": 1, "step": 3})
    assert trainings.exit_codes() == [76, 76], trainings.end_of_log()
    for rank, report in enumerate(read_reports(reports)):
        assert (report["rank"], report["outcome"], report["exit"], report["step"]) == (rank, "hung", 76, 2)
        assert report["what"].startswith("no progress for ")
        assert f"[rank {rank} on {report['host']}] hung: no progress for " in trainings.log.read_text()
        mine = [line for line in trainings.log.read_text().splitlines() if line.startswith(f"[rank {rank} on ")]
        assert any("in failing" in line for line in mine) == (rank == 1)
        assert any("in train" in line for line in mine)


def test_a_rank_that_is_stopped_does_not_hang_itself(trainings, tmp_path, reports):
    processes = start(trainings, tmp_path, reports, slow={"step": 0.3})
    assert wait_for(lambda: newest_step(tmp_path / "run") > 0), trainings.end_of_log()
    os.kill(processes[1], signal.SIGSTOP)
    assert wait_for((reports / "rank_0.json").exists)
    os.kill(processes[1], signal.SIGCONT)
    assert trainings.exit_codes() == [76, 1], trainings.end_of_log()
    first, second = read_reports(reports)
    assert (first["outcome"], second["outcome"]) == ("hung", "failed")
    assert first["time"] < second["time"]


def test_a_rank_that_raises_is_named_and_the_first_to_be(trainings, tmp_path, reports):
    start(trainings, tmp_path, reports, fault={"kind": "raise", "rank": 1, "step": 2})
    assert trainings.exit_codes() == [1, 1], trainings.end_of_log()
    other, cause = read_reports(reports)
    assert (cause["outcome"], cause["exit"], cause["what"]) == ("failed", 1, "MemoryError: no room left")
    assert f"failed (rank 1 on {cause['host']}): MemoryError: no room left" in trainings.log.read_text()
    assert other["outcome"] == "failed"
    assert cause["time"] < other["time"]


def test_a_user_error_is_reported(trainings, tmp_path, reports):
    trainings.start(tmp_path / "run", 1, "optim.lrr=1", environment={"GCVIT_REPORT_DIR": str(reports)})
    assert trainings.exit_codes() == [2]
    (report,) = read_reports(reports)
    assert (report["outcome"], report["exit"], report["step"]) == ("user error", 2, None)
    assert "optim.lrr" in report["what"]


def test_a_run_that_is_taken_over_stops_and_the_restart_goes_on(trainings, tmp_path, reports):
    """A node that was cut off trains on, while SLURM has started its job again elsewhere."""
    words = [*ENGINES["ddp"], "schedule.cosine=60 steps", "trainer.save_every=3 steps", "trainer.eval_every=60 steps"]
    here = {"GCVIT_REPORT_DIR": str(reports), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}
    trainings.start(tmp_path / "run", 1, *words, environment=here, slow={"step": 0.5})
    assert wait_for(lambda: newest_step(tmp_path / "run") > 0), trainings.end_of_log()
    command = ["train.py", "--config", "tests/helpers/golden.yaml", "--data_dir", trainings.data, "--tag", "run"]
    succeed(python(*command, f"output_dir={tmp_path}", *words, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1"))
    assert trainings.exit_codes() == [2], trainings.end_of_log()
    (report,) = read_reports(reports)
    assert report["what"].startswith("another run has taken this run's folder over: got ")
    assert "job 7, restart 1, process " in report["what"]
    assert newest_step(tmp_path / "run") == 60


# ---- as the launchers start it -------------------------------------------------------------------

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--shutdown-timeout=60"]


def begin(trainings: Trainings, tmp_path: Path, launcher: list[str], reports: Path) -> subprocess.Popen[bytes]:
    """train.py with loaders, in processes that take no USR1 but where Python asks for it (torchrun would die of it)."""
    words = ["train.py", "--config", "tests/helpers/golden.yaml", "--data_dir", trainings.data, "--tag", "run"]
    words += [f"output_dir={tmp_path}", *OVERRIDES, *ENGINES["ddp"], "data.num_workers=2"]
    command = ["bash", "-c", "trap '' USR1; exec \"$@\"", "-", sys.executable, *launcher, *words]
    with open(tmp_path / "log", "ab") as log:
        return subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=environment(GCVIT_REPORT_DIR=str(reports)),
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def family_of(process: int) -> list[int]:
    """It and all that it started, and so on: launcher, ranks, loaders and their servers."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ends while we look
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    return [process, *(member for child in children.get(process, []) for member in family_of(child))]


def is_alive(process: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("way", ["usr1 to all", "term to torchrun", "alone, both to all after the end"])
def test_as_the_launchers_start_it(trainings, tmp_path, reports, way):
    alone = way.startswith("alone")
    started = begin(trainings, tmp_path, [] if alone else TORCHRUN, reports)

    def has_said(words: str) -> bool:
        return started.poll() is not None or words in (tmp_path / "log").read_text()

    try:
        assert wait_for(lambda: has_said(f"step {STEPS}/{STEPS}  saved" if alone else "step 2/"))
        family = family_of(started.pid)
        assert len(family) >= (4 if alone else 9)  # a rank has two servers and, where it trains, two loaders or more
        while alone and started.poll() is None:
            send(family, signal.SIGUSR1)
            send(family, signal.SIGTERM)
            time.sleep(0.002)
        if not alone:
            send(family if way == "usr1 to all" else family[:1], SIGNALS["term" in way])
        code = started.wait(120)
        log = (tmp_path / "log").read_text()
        assert (code == 0) == alone, log[-4000:]
        assert wait_for(lambda: not any(map(is_alive, family)), 20), "a process outlived the run"
        told = [(report["outcome"], report["exit"]) for report in read_reports(reports)]
        assert told == ([("finished", 0)] if alone else [("preempted", 75)] * 2), log[-4000:]
        assert newest_step(tmp_path / "run") == STEPS if alone else newest_step(tmp_path / "run") > 1
        assert '/train.py", line' not in log, log[-4000:]  # torchrun shows tracebacks of its own
    finally:
        send(family_of(started.pid), signal.SIGKILL)
        started.wait()
