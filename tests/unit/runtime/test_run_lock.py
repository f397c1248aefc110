"""Who may hold the lock of a run's folder, where the system's own lock says too much or too little."""

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from gcvit.errors import UserError
from gcvit.runtime import run_lock
from gcvit.runtime.run_lock import Holder, RunLock

OTHER = Holder(job=None, restart=0, host="node9", pid=77, since="Mon Nov 23 04:00:00 2026")


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(run_lock, "_WATCH_SECONDS", 0.2)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def sign(run_dir: Path, holder: Holder, age: float = 0.0) -> None:
    (run_dir / "lock").write_text(json.dumps({**asdict(holder), "heartbeat": time.time() - age}))


@contextmanager
def kept_by_the_system(run_dir: Path) -> Iterator[None]:
    """As a file server keeps the lock of a node that lost its power."""
    with open(run_dir / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def beating(run_dir: Path, holder: Holder, age: float = 0.0) -> Iterator[None]:
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(0.01):
            sign(run_dir, holder, age)

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    is_over.set()
    thread.join()


def enter(run_dir: Path) -> None:
    with RunLock(run_dir) as lock:
        lock.check()
        assert json.loads((run_dir / "lock").read_text())["pid"] == os.getpid()


def start_of(monkeypatch, run_dir: Path, job: str, restart: int) -> RunLock:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    return RunLock(run_dir)


def test_a_live_run_keeps_its_lock(tmp_path):
    with RunLock(tmp_path) as first:
        with pytest.raises(UserError, match="in use by a live run") as caught:
            enter(tmp_path)
        first.check()
    assert f"process {os.getpid()} on " in str(caught.value)
    enter(tmp_path)


def test_a_heartbeat_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_BEAT_SECONDS", 0.01)
    beats, clock = set(), iter(range(1_700_000_000, 1_800_000_000))
    monkeypatch.setattr(run_lock.time, "time", lambda: float(next(clock)))
    with RunLock(tmp_path):
        end = time.monotonic() + 60
        while len(beats) < 3 and time.monotonic() < end:
            beats.add(json.loads((tmp_path / "lock").read_text())["heartbeat"])
    assert len(beats) == 3
    assert (tmp_path / "lock").read_text() == "", "a lock that was given back is nobody's"


def test_a_later_restart_of_the_job_takes_over_at_once(tmp_path, monkeypatch):
    with start_of(monkeypatch, tmp_path, "12", 0) as first:
        with start_of(monkeypatch, tmp_path, "12", 1) as second:
            second.check()
            with pytest.raises(UserError, match="taken this run's folder over") as caught:
                first.check()
            assert "job 12, restart 1, " in str(caught.value)
            third = start_of(monkeypatch, tmp_path, "12", 2)
        with third:
            third.check()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize(("job", "restart"), [("12", 0), ("13", 5)])
def test_no_other_start_takes_it(tmp_path, monkeypatch, job, restart):
    with start_of(monkeypatch, tmp_path, "12", 0) as first:
        with pytest.raises(UserError, match="in use"), start_of(monkeypatch, tmp_path, job, restart):
            pass
        first.check()


def test_a_dead_nodes_lock_is_taken_over_after_a_minute(tmp_path):
    sign(tmp_path, OTHER, age=55)
    with kept_by_the_system(tmp_path), pytest.raises(UserError, match="on node9"):
        enter(tmp_path)
    sign(tmp_path, OTHER, age=65)
    with kept_by_the_system(tmp_path):
        enter(tmp_path)


def test_a_live_node_whose_clock_is_slow_keeps_its_lock(tmp_path):
    sign(tmp_path, OTHER, age=999)
    with kept_by_the_system(tmp_path), beating(tmp_path, OTHER, age=999), pytest.raises(UserError, match="on node9"):
        enter(tmp_path)


def test_where_the_file_system_locks_within_a_node_only(tmp_path):
    sign(tmp_path, OTHER)
    with beating(tmp_path, OTHER), pytest.raises(UserError, match="on node9"):
        enter(tmp_path)
    enter(tmp_path)  # it has died


def test_on_the_same_node_nobody_waits_for_a_dead_one(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_WATCH_SECONDS", 1e9)
    sign(tmp_path, replace(RunLock(tmp_path).holder, pid=2**22, since="a longer text than any that comes later"))
    enter(tmp_path)


def test_what_is_no_signature_is_nobodys(tmp_path):
    (tmp_path / "lock").write_text("{")
    enter(tmp_path)
    with kept_by_the_system(tmp_path), pytest.raises(UserError, match="just starting"):
        enter(tmp_path)
