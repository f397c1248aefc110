"""The process that writes checkpoints: whatever happens to it is raised, and it never outlives its trainer."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gcvit.checkpoint import manager, writer_process
from gcvit.checkpoint.manager import CheckpointManager
from gcvit.checkpoint.store import RunState, list_checkpoints, open_checkpoint, read_tensors
from gcvit.errors import UserError
from gcvit.runtime.distributed import World, join_world
from tests.unit.checkpoint.test_manager import INFO, tensors_of

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with join_world() as joined:
        yield joined


@pytest.fixture
def started(world, tmp_path) -> Iterator[CheckpointManager]:
    started = CheckpointManager(tmp_path, world, keep=2)
    yield started
    started.abandon()


def is_alive(pid: int) -> bool:
    """Whether there is a process of this number that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pid: int) -> None:
    end = time.monotonic() + 60
    while is_alive(pid):
        assert time.monotonic() < end, "the writer lives on"
        time.sleep(0.01)


def test_it_loads_the_standard_library_alone():
    """Without the site's packages nothing else could be imported."""
    subprocess.run([sys.executable, "-S", "-c", f"import {writer_process.__name__}"], cwd=ROOT, check=True)


def test_it_is_what_writes(started, monkeypatch):
    """Not this process: here nothing can be written."""
    monkeypatch.setattr(manager.store, "write_here", None)
    for step in (1, 2):
        started.save(RunState(step=step), tensors_of(step), INFO)
    started.wait()
    for step, path in zip((1, 2), list_checkpoints(started._folder), strict=True):
        assert torch.equal(read_tensors(open_checkpoint(path), "model")["w"], torch.full((2, 4), float(step)))


def test_a_writer_that_was_killed_is_no_success(started):
    os.kill(started._process.pid, signal.SIGKILL)
    started.save(RunState(step=1), tensors_of(1.0), INFO)
    with pytest.raises(RuntimeError, match=re.escape("has ended with -9")):
        started.wait()
    assert not list(started._folder.iterdir()), "nothing half is left"


def test_a_writer_that_is_killed_while_it_writes(started):
    os.kill(started._process.pid, signal.SIGSTOP)
    started.save(RunState(step=1), tensors_of(1.0), INFO)
    time.sleep(0.1)
    assert started.poll() == []
    os.kill(started._process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="checkpoint of step 1 failed"):
        started.wait()
    assert not list_checkpoints(started._folder)


def test_a_disk_that_is_full_for_the_writer(started):
    resource.prlimit(started._process.pid, resource.RLIMIT_FSIZE, (10, 10))
    started.save(RunState(step=1), tensors_of(1.0), INFO)
    with pytest.raises(UserError, match=re.escape("step_00000001.tmp/rank_00000.safetensors (File too large)")):
        started.wait()
    assert not list(started._folder.iterdir())


def test_signals_of_the_job_do_not_end_it(started):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(started._process.pid, number)
    started.save(RunState(step=1), tensors_of(1.0), INFO)
    assert [finished.step for finished in started.wait()] == [1]


def test_without_shared_memory_the_trainer_writes_and_says_so(started, monkeypatch):
    def refuse(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    monkeypatch.setattr(started._process, "write", None)
    for step in (1, 2):
        started.save(RunState(step=step), tensors_of(step), INFO)
        (finished,) = started.wait()
        assert len(finished.messages) == (step == 1)
    assert len(list_checkpoints(started._folder)) == 2


TRAINER = """
import sys, time
from pathlib import Path
from gcvit.checkpoint.manager import CheckpointManager
from gcvit.runtime.distributed import join_world
with join_world() as world:
    manager = CheckpointManager(Path(sys.argv[1]), world, keep=1)
    print(manager._process.pid, flush=True)
    time.sleep(200)
"""


@pytest.mark.parametrize("delay", [0.0, 0.02, 1.0])
def test_it_dies_with_its_trainer(tmp_path, delay):
    """Killed at once, or when the writer is ready; its input stays open, as a loader process would keep it."""
    with subprocess.Popen([sys.executable, "-c", TRAINER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout
        writer = int(trainer.stdout.readline())
        held = os.open(f"/proc/{writer}/fd/0", os.O_WRONLY)
        time.sleep(delay)
        trainer.kill()
        trainer.wait()
        wait_for_end(writer)
        os.close(held)


def test_it_ends_though_its_input_is_held_open(world, tmp_path):
    started = CheckpointManager(tmp_path, world, keep=1)
    held = os.open(f"/proc/{started._process.pid}/fd/0", os.O_WRONLY)
    started.close()
    assert not is_alive(started._process.pid)
    os.close(held)
