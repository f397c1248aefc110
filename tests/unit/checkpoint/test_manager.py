"""Checkpoints beside the training: what is written is what was there at the call; what goes wrong is told."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gcvit.checkpoint import manager
from gcvit.checkpoint.manager import CheckpointManager
from gcvit.checkpoint.store import RunState, list_checkpoints, open_checkpoint, read_tensors, step_of
from gcvit.checkpoint.writer_process import WriterProcess
from gcvit.errors import UserError
from gcvit.parallel.engine import Fragment, Fragments

INFO = {"config": {}, "data": "digest", "world_size": 1}


@pytest.fixture
def started(world, tmp_path) -> Iterator[CheckpointManager]:
    manager = CheckpointManager(tmp_path / "checkpoints", world, keep=2)
    yield manager
    if manager._process._process.poll() is None:
        manager.abandon()


def tensors_of(value: float, device: torch.device | None = None) -> dict[str, Fragments]:
    data = torch.full((12,), value, device=device)
    return {"model": {"w": Fragment(data[:8], 0, torch.Size([2, 4])), "b": Fragment(data[8:], 0, torch.Size([4]))}}


class Gate:
    """Holds the writer before its file, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.is_reached, self._opened = threading.Event(), threading.Event()
        right = WriterProcess.write

        def write(*arguments):
            self.is_reached.set()
            assert self._opened.wait(60)
            return right(*arguments)

        monkeypatch.setattr(WriterProcess, "write", write)

    def open(self) -> None:
        self._opened.set()


def steps_in(tmp_path: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(tmp_path / "checkpoints")]


@pytest.mark.gpu
def test_what_is_written_is_what_was_there_at_the_call(started, tmp_path, monkeypatch, device):
    gate = Gate(monkeypatch)
    tensors, state = tensors_of(1.0, device), RunState(step=3, samples=24)
    started.save(state, tensors, INFO)
    assert gate.is_reached.wait(60)
    for part in tensors["model"].values():  # the training goes on
        part.data.fill_(2.0)
    state.step, state.best_step = 4, 4
    gate.open()
    started.wait()
    found = open_checkpoint(tmp_path / "checkpoints/step_00000003")
    assert found.state == RunState(step=3, samples=24)
    assert torch.equal(read_tensors(found, "model")["w"], torch.ones(2, 4))


def test_the_next_save_waits_and_says_so(started, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    assert started.save(RunState(step=1), tensors_of(1.0), INFO) == []
    assert gate.is_reached.wait(60)
    assert started.poll() == [], "a poll does not wait"
    assert steps_in(tmp_path) == []
    threading.Timer(0.2, gate.open).start()
    (before,) = started.save(RunState(step=2), tensors_of(2.0), INFO)
    assert 1 in steps_in(tmp_path)
    (message,) = before.messages
    assert message.startswith("training waited 0.")
    assert "checkpoint of step 1" in message
    started.wait()
    assert steps_in(tmp_path) == [1, 2]
    for step in (1, 2):
        found = open_checkpoint(tmp_path / f"checkpoints/step_{step:08d}")
        assert torch.equal(read_tensors(found, "model")["b"], torch.full((4,), float(step)))


def test_a_save_is_returned_once_with_its_costs(started, tmp_path):
    started.save(RunState(step=1), tensors_of(1.0), INFO)
    (finished,) = started.wait()
    assert [*started.poll(), *started.wait()] == []
    files = list((tmp_path / "checkpoints/step_00000001").iterdir())
    assert (finished.step, finished.bytes) == (1, sum(path.stat().st_size for path in files))
    assert 0 < finished.stall_seconds < 60
    assert 0 < finished.write_seconds < 60
    assert finished.messages == ()


def test_old_ones_go_when_the_new_one_is_complete(started, tmp_path, monkeypatch):
    for step in (1, 2, 3):
        started.save(RunState(step=step, best_step=1), tensors_of(step), INFO)
    started.wait()
    assert steps_in(tmp_path) == [1, 2, 3]
    gate = Gate(monkeypatch)
    started.save(RunState(step=4, best_step=1), tensors_of(4.0), INFO)
    assert gate.is_reached.wait(60)
    assert steps_in(tmp_path) == [1, 2, 3]
    gate.open()
    started.wait()
    assert steps_in(tmp_path) == [1, 3, 4]


def test_closing_waits_for_the_write(started, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    started.save(RunState(step=1), tensors_of(1.0), INFO)
    threading.Timer(0.2, gate.open).start()
    (finished,) = started.close()
    assert finished.step == 1
    assert steps_in(tmp_path) == [1]


def test_abandoning_waits_too(started, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    started.save(RunState(step=1), tensors_of(1.0), INFO)
    threading.Timer(0.2, gate.open).start()
    assert started.abandon() == []
    assert steps_in(tmp_path) == [1]


# ---- errors --------------------------------------------------------------------------------------


@pytest.fixture
def failing(started, tmp_path) -> CheckpointManager:
    """Its write has failed: there is a file in the folder's place."""
    (tmp_path / "checkpoints").write_text("")
    started.save(RunState(step=1), tensors_of(1.0), INFO)
    assert started._thread
    started._thread.join()
    return started


def save_again(failing: CheckpointManager) -> None:
    failing.save(RunState(step=2), tensors_of(2.0), INFO)


@pytest.mark.parametrize("call", [CheckpointManager.poll, CheckpointManager.wait, save_again, CheckpointManager.close])
def test_a_write_that_failed_is_raised_at_the_next_call(failing, tmp_path, call):
    with pytest.raises(UserError, match="cannot write the checkpoint") as caught:
        call(failing)
    assert str(tmp_path / "checkpoints") in str(caught.value)
    assert "hint: " in str(caught.value)
    assert failing.poll() == [], "once"


def test_a_write_that_failed_is_told_beside_another_error(failing):
    (line,) = failing.abandon()
    assert "cannot write the checkpoint" in line


def test_a_bug_in_the_writer_is_not_swallowed(started, monkeypatch):
    monkeypatch.setattr(WriterProcess, "write", lambda *_: 1 / 0)
    started.save(RunState(step=1), tensors_of(1.0), INFO)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        started.wait()


def test_nothing_is_written_where_replicas_differ(started, tmp_path, monkeypatch):
    monkeypatch.setattr(manager, "check_replicas", lambda *_: (_ for _ in ()).throw(UserError("diverge")))
    with pytest.raises(UserError, match="diverge"):
        started.save(RunState(step=1), tensors_of(1.0), INFO)
    started.wait()
    assert steps_in(tmp_path) == []


# ---- the beginning -------------------------------------------------------------------------------


def test_what_a_killed_run_left_is_cleared(started, tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        started.save(RunState(step=step, best_step=1), tensors_of(1.0), INFO)
        started.wait()
    os.rename(folder / "step_00000003", folder / "step_00000003.tmp")
    (folder / "step_00000005.tmp").mkdir()
    (folder / "step_00000002.corrupt").mkdir()
    started.begin(RunState(step=4, best_step=1), tensors_of(1.0))
    assert sorted(path.name for path in folder.iterdir()) == [
        *("step_00000001", "step_00000002.corrupt", "step_00000004")
    ]


def test_a_folder_that_cannot_be_written_is_told_before_the_training(started, tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="cannot write the checkpoint") as caught:
        started.begin(RunState(), tensors_of(1.0))
    assert str(tmp_path / "checkpoints") in str(caught.value)


def test_the_disk_use_is_logged(started, tmp_path, monkeypatch, caplog):
    usage = type("Usage", (), {"free": 4 * 48})
    monkeypatch.setattr(manager.shutil, "disk_usage", lambda path: usage)
    caplog.set_level("INFO")
    started.begin(RunState(), tensors_of(1.0))
    usage.free -= 1
    started.begin(RunState(), tensors_of(1.0))
    enough, too_little = caplog.records
    assert enough.message.startswith("checkpoints take 4.8e-08 GB each, 2 kept")
    assert f"up to 1.92e-07 GB, of 1.92e-07 GB free in {tmp_path}" in enough.message
    assert (enough.levelname, too_little.levelname) == ("INFO", "WARNING")
    assert "lower trainer.keep_checkpoints" in too_little.message
