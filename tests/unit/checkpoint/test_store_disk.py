"""A disk that is full, fails or lies while a checkpoint is written: the file is named, and nothing half is left."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gcvit.checkpoint.store import (
    RunState,
    list_checkpoints,
    open_checkpoint,
    prepare,
    prune,
    read_tensors,
    restate,
    save,
)
from gcvit.errors import UserError
from gcvit.runtime.distributed import World, join_world
from tests.unit.checkpoint.test_store import INFO, STATE, draw_tensors, whole


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with join_world() as joined:
        yield joined


@pytest.fixture
def saved(world, tmp_path) -> Path:
    return save(tmp_path / "checkpoints", STATE, whole(draw_tensors(0)), INFO, world)


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """As if the disk were full: no file grows beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def at_fsync(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[Path], None]) -> None:
    """Let something happen to the file or folder of this name when it is flushed to the disk."""
    right = os.fsync

    def fsync(handle: int) -> None:
        right(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.name.startswith(name):
            act(path)

    monkeypatch.setattr(os, "fsync", fsync)


def refused_save(folder: Path, world: World) -> str:
    before = sorted(folder.iterdir())
    with pytest.raises(UserError) as caught:
        save(folder, RunState(step=20), whole(draw_tensors(2)), INFO, world)
    assert sorted(folder.iterdir()) == before, "a full disk is not to be kept full"
    return str(caught.value)


FILES = ("rank_00000.safetensors", "state.json")


@pytest.mark.parametrize("limit", [0, 1, 700])
def test_a_full_disk(world, saved, limit):
    with file_size_limit(limit):
        message = refused_save(saved.parent, world)
    place = saved.with_name("step_00000020.tmp") / "rank_00000.safetensors"
    assert message.startswith(f"cannot write the checkpoint: got {place} (File too large); hint: ")


@pytest.mark.parametrize("file", [*FILES, "step_00000020.tmp"])
def test_a_disk_that_fails(world, saved, monkeypatch, file):
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    at_fsync(monkeypatch, file, fail)
    message = refused_save(saved.parent, world)
    assert message.startswith("cannot write the checkpoint: got ")
    assert "step_00000020.tmp" in message
    assert file in message
    assert "Input/output error" in message


@pytest.mark.parametrize("file", FILES)
def test_a_disk_that_keeps_something_else(world, saved, monkeypatch, file):
    """Told before the checkpoint gets its name."""

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    at_fsync(monkeypatch, file, flip)
    message = refused_save(saved.parent, world)
    assert message.startswith("the disk does not give back what was written to it: got ")
    assert file in message


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_vanishes_while_it_is_written(world, saved, monkeypatch, file):
    at_fsync(monkeypatch, file, Path.unlink)
    message = refused_save(saved.parent, world)
    assert file in message
    assert "No such file" in message


def test_a_checkpoint_that_cannot_be_deleted_yet(world, saved, monkeypatch):
    """NFS keeps a file that somebody reads, and its folder: the save is complete, and deletes it the next time."""
    right = os.rmdir

    def rmdir(path: str, **options: int | None) -> None:
        if str(path).startswith(saved.name) or str(path).endswith(f"{saved.name}.tmp"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        right(path, **options)

    newer = save(saved.parent, RunState(step=20), whole(draw_tensors(2)), INFO, world)
    monkeypatch.setattr(os, "rmdir", rmdir)
    prune(saved.parent, keep=1, best_step=-1)
    newest = save(saved.parent, RunState(step=30), whole(draw_tensors(3)), INFO, world)
    assert list_checkpoints(saved.parent) == [newer, newest]
    assert saved.with_name(f"{saved.name}.tmp").exists()
    monkeypatch.undo()
    prepare(saved.parent)
    assert not list(saved.parent.glob("*.tmp"))


def test_an_export_that_is_under_way_is_left_alone(saved):
    export = saved.with_name(f"{saved.name}-export.tmp")
    export.mkdir()
    prepare(saved.parent)
    assert export.exists()


def test_what_was_learnt_later_is_stated_and_the_tensors_stay(saved):
    before, info = read_tensors(open_checkpoint(saved), "model"), open_checkpoint(saved).info
    state = RunState(**vars(STATE) | {"best_top1": 99.5, "best_step": STATE.step})
    restate(saved, state)
    found = open_checkpoint(saved)
    assert found.state == state
    assert found.info == info
    after = read_tensors(found, "model")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("file", ["state.json.tmp", "step_00000012"])
def test_a_statement_that_cannot_be_written_leaves_a_whole_checkpoint(saved, monkeypatch, file):
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    at_fsync(monkeypatch, file, fail)
    with pytest.raises(UserError, match="Input/output error"):
        restate(saved, RunState(step=STATE.step, best_step=7))
    assert open_checkpoint(saved).state.step == STATE.step


# ---- a run that was outbid -----------------------------------------------------------------------


@pytest.mark.parametrize("num_checks", [0, 1])
def test_a_writer_that_was_outbid_touches_nothing_more(world, saved, num_checks):
    """Told before it clears what it takes for leftovers, or before the rename: both are the other run's by then."""
    checks, other = iter(range(num_checks)), saved.with_name("step_00000030.tmp")

    def check_lock() -> None:
        if next(checks, None) is None:
            prepare(saved.parent)  # the other run begins, and writes
            other.mkdir()
            (saved.with_name("step_00000020.tmp")).mkdir()
            raise UserError("taken over")

    with pytest.raises(UserError, match="taken over"):
        save(saved.parent, RunState(step=20), whole(draw_tensors(2)), INFO, world, check_lock=check_lock)
    assert list_checkpoints(saved.parent) == [saved]
    assert other.exists()
    assert saved.with_name("step_00000020.tmp").exists()
