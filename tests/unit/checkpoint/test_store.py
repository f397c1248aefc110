"""Checkpoints: any cut to any other, to the bit; nothing half, corrupt, foreign or untrue is loaded."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors

from gcvit.checkpoint import format
from gcvit.checkpoint.store import (
    CorruptCheckpointError,
    RunState,
    latest,
    load,
    open_checkpoint,
    own_part,
    prune,
    read_tensors,
    save,
)
from gcvit.errors import UserError
from gcvit.optim.adamw import Counters
from gcvit.parallel.engine import Fragment, Fragments
from gcvit.runtime.distributed import World, join_world

SHAPES = {"head.weight": torch.Size([5, 7]), "head.bias": torch.Size([5]), "deep": torch.Size([2, 3, 2, 2])}
STATE = RunState(step=12, samples=384, counters=Counters(updates=11), ema_updates=12, best_top1=71.25, best_step=8)
INFO = {"config": {"tag": "test"}, "data": "digest", "world_size": 1}
KINDS = ("model", "exp_avg")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with join_world() as joined:
        yield joined


def draw_tensors(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {k: {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()} for k in KINDS}


def whole(tensors: dict[str, dict[str, torch.Tensor]]) -> dict[str, Fragments]:
    return {k: {n: Fragment(t.view(-1), 0, t.shape) for n, t in named.items()} for k, named in tensors.items()}


@pytest.fixture
def saved(world, tmp_path) -> Path:
    return save(tmp_path / "checkpoints", STATE, whole(draw_tensors(0)), INFO, world)


def assert_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


# ---- there and back ------------------------------------------------------------------------------


def test_all_comes_back(world, saved):
    tensors = draw_tensors(0)
    found = open_checkpoint(saved)
    assert found.state == STATE
    assert {key: found.info[key] for key in INFO} == INFO
    assert found.shapes == {f"{kind}.{name}": shape for kind in KINDS for name, shape in SHAPES.items()}
    for kind in KINDS:
        assert_equal(read_tensors(found, kind), tensors[kind])
    other = draw_tensors(1)
    load(found, whole(other), world)
    for kind in KINDS:
        assert_equal(other[kind], tensors[kind])


def test_a_kind_may_be_left_out(world, saved):
    other = draw_tensors(1)
    load(open_checkpoint(saved), {"model": whole(other)["model"]}, world)
    assert_equal(other["model"], draw_tensors(0)["model"])
    assert_equal(other["exp_avg"], draw_tensors(1)["exp_avg"])


@settings(max_examples=15)
@given(
    places=st.fixed_dictionaries(
        {n: st.tuples(*[st.integers(0, s.numel())] * 2).map(sorted) for n, s in SHAPES.items()}
    ),
    seed=st.integers(0, 1000),
)
def test_any_range_of_a_tensor_can_be_loaded(world, tmp_path_factory, places, seed):
    """What another world size or engine would hold: a part of each tensor, in the middle of rows or empty."""
    tensors = draw_tensors(seed)
    path = save(tmp_path_factory.mktemp("cut"), STATE, whole(tensors), INFO, world)
    parts = {
        kind: {
            n: Fragment(torch.full((stop - start,), torch.nan), start, SHAPES[n]) for n, (start, stop) in places.items()
        }
        for kind in KINDS
    }
    load(open_checkpoint(path), parts, world)
    for kind in KINDS:
        for name, (start, stop) in places.items():
            assert torch.equal(parts[kind][name].data, tensors[kind][name].view(-1)[start:stop]), name


@given(numel=st.integers(0, 50), num_replicas=st.integers(1, 9), start=st.integers(0, 20))
def test_replicas_divide_a_fragment_among_them(numel, num_replicas, start):
    """Each writes its part: together they are the whole, once."""
    data, shape = torch.arange(float(numel)), torch.Size([start + numel])
    parts = [own_part(Fragment(data, start, shape, replica, num_replicas)) for replica in range(num_replicas)]
    assert torch.equal(torch.cat([part.data for part in parts]), data)
    assert [part.start for part in parts] == sorted(part.start for part in parts)
    for part in parts:
        assert torch.equal(part.data + start, torch.arange(float(len(part.data))) + part.start)


def test_a_tensor_holds_the_bits_of_special_values(world, tmp_path):
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45])
    fragments = {"model": {"w": Fragment(special, 0, special.shape)}}
    path = save(tmp_path, STATE, fragments, INFO, world)
    back = read_tensors(open_checkpoint(path), "model")["w"]
    assert torch.equal(back.view(torch.int32), special.view(torch.int32))


# ---- whole or not at all -------------------------------------------------------------------------


def test_a_save_over_what_a_killed_one_left(world, saved):
    folder = saved.parent
    shutil.copytree(saved, folder / "step_00000020.tmp")
    shutil.copytree(saved, folder / "step_00000004.tmp")
    assert latest(folder) == saved
    again = save(folder, RunState(step=20), whole(draw_tensors(2)), INFO, world)  # over the leftover
    assert latest(folder) == again
    assert_equal(read_tensors(open_checkpoint(again), "model"), draw_tensors(2)["model"])
    assert sorted(path.name for path in folder.iterdir()) == [saved.name, again.name]


def test_latest_is_the_highest_complete_one(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "absent") is None
    for name in ("step_00000009", "step_00000010", "step_00000011.tmp", "step_x", "other", "step_7"):
        (tmp_path / name).mkdir()
    assert latest(tmp_path) == tmp_path / "step_00000010"


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(1, 2, [2, 5]), (2, 5, [4, 5]), (3, -1, [3, 4, 5]), (9, 1, [1, 2, 3, 4, 5]), (1, 99, [5])],
)
def test_prune_keeps_the_newest_and_the_best(tmp_path, keep, best, left):
    for step in range(1, 6):
        (tmp_path / f"step_{step:08d}").mkdir()
        (tmp_path / f"step_{step:08d}" / "file").write_text("")
    (tmp_path / "notes.txt").write_text("")
    prune(tmp_path, keep=keep, best_step=best)
    names = [f"step_{step:08d}" for step in left]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "notes.txt"])


# ---- corrupt, foreign ----------------------------------------------------------------------------


def change_state(path: Path, **changes: Any) -> None:
    """Change `state.json` as its author would."""
    content = json.loads((path / "state.json").read_text()) | changes
    del content["sha256"]
    index = format.encode_index(content.pop("tensors"))
    (path / "state.json").write_bytes(format.encode_state(content, index))


def data_file(path: Path) -> Path:
    return path / "rank_00000.safetensors"


def refusal(path: Path, world: World, tensors: dict[str, Fragments] | None = None) -> str:
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(UserError) as caught:
        load(open_checkpoint(path), tensors or whole(draw_tensors(1)), world)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    return str(caught.value)


def test_a_truncated_file(world, saved):
    os.truncate(data_file(saved), data_file(saved).stat().st_size - 1)
    message = refusal(saved, world)
    assert message.startswith(f"corrupt checkpoint: {data_file(saved)}: got ")
    assert "hint: " in message


def test_a_missing_file(world, saved):
    path = data_file(saved)
    path.unlink()
    assert f"corrupt checkpoint: {path}: got no such file" in refusal(saved, world)


def test_a_missing_folder(world, tmp_path):
    assert "no checkpoint here" in refusal(tmp_path / "absent", world)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "5", "{}", '{"state": {"stepp": 1}, "tensors": {}, "files": {}}', '"text"']
)
def test_a_state_file_that_cannot_be_read(world, saved, content):
    (saved / "state.json").write_text(content)
    assert f"corrupt checkpoint: {saved / 'state.json'}" in refusal(saved, world)


def test_flipped_bits_in_the_state_file(world, saved):
    """Each byte but the spaces that lay it out counts, also digits that would be as good as others."""
    path = saved / "state.json"
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        if content[place : place + 1].isspace():
            continue
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match=re.escape(str(saved))):
            open_checkpoint(saved)


def test_a_state_file_that_is_missing(world, saved):
    (saved / "state.json").unlink()
    assert f"corrupt checkpoint: {saved / 'state.json'}: got no such file" in refusal(saved, world)


def test_another_format(world, saved):
    change_state(saved, format=99)
    assert "another format: got 99" in refusal(saved, world)


@pytest.mark.parametrize("number", [1, 2])
def test_an_earlier_format_names_the_commit_that_reads_it(world, saved, number):
    (saved / "state.json").write_text(json.dumps({"format": number, "shapes": {}, "files": {}, "sha256": "0" * 64}))
    message = refusal(saved, world)
    assert f"another format: got {number}; expected: 3" in message
    assert "a2db64e" in message


def test_a_flipped_format_is_corruption(saved):
    path = saved / "state.json"
    path.write_bytes(path.read_bytes().replace(b'"format": 3', b'"format": 2'))
    with pytest.raises(CorruptCheckpointError):
        open_checkpoint(saved)


def test_flipped_bits_in_a_tensor(world, saved):
    """The size is right, the values are not."""
    path = data_file(saved)
    value = draw_tensors(0)["model"]["deep"].numpy().tobytes()
    content = path.read_bytes()
    assert content.count(value) == 1
    at = content.index(value) + 5
    path.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
    assert str(saved) in refusal(saved, world)


def with_shape(name: str, shape: torch.Size) -> dict[str, Fragments]:
    tensors = whole(draw_tensors(1))
    tensors["model"][name] = Fragment(torch.zeros(shape.numel()), 0, shape)
    return tensors


def test_a_tensor_of_another_shape(world, saved):
    message = refusal(saved, world, with_shape("head.weight", torch.Size([3, 7])))
    assert "checkpoint of another model" in message
    assert "model.head.weight of shape (5, 7)" in message
    assert "(3, 7)" in message
    assert "hint: " in message


def test_the_same_size_in_another_shape(world, saved):
    assert "another model" in refusal(saved, world, with_shape("head.weight", torch.Size([7, 5])))


def test_a_tensor_that_is_not_stored(world, saved):
    message = refusal(saved, world, with_shape("neck", torch.Size([3])))
    assert "model.neck" in message


def test_a_tensor_that_nobody_wants(world, saved):
    """A deeper model's checkpoint has all that this one asks for, and more: it is another model's all the
    same."""
    tensors = whole(draw_tensors(1))
    for kind in KINDS:
        del tensors[kind]["deep"]
    assert "another model" in refusal(saved, world, tensors)


def test_nothing_is_filled_before_all_is_checked(world, saved):
    tensors = draw_tensors(1)
    fragments = whole(tensors)
    fragments["exp_avg"]["neck"] = Fragment(torch.zeros(3), 0, torch.Size([3]))
    refusal(saved, world, fragments)
    for kind in KINDS:
        assert_equal(tensors[kind], draw_tensors(1)[kind])


# ---- a file that is not what the index says ------------------------------------------------------


def plant(path: Path, name: str, content: bytes) -> None:
    """Put another file in the place of one, as its author would: with the size and hash in `state.json`."""
    (path / name).write_bytes(content)
    record = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_state(path, files=json.loads((path / "state.json").read_text())["files"] | {name: record})


def test_no_file_gives_a_traceback(world, saved):
    """Cut anywhere in the header, or of other tensors: refused in words, where nothing but the content tells."""
    path = data_file(saved)
    content = path.read_bytes()
    others = [save_tensors({}), save_tensors({"model.deep": torch.zeros(3)})]
    halves = {f"{k}.{n}": t.flatten().half() for k, named in draw_tensors(0).items() for n, t in named.items()}
    versions = [content[:place] for place in range(0, 400, 20)] + [*others, save_tensors(halves)]
    for version in versions:
        plant(saved, path.name, version)
        assert f"cannot read the tensors of {path}" in refusal(saved, world)


@pytest.mark.parametrize(
    "ranges",
    [
        *([], [[0, 0, 23, 1, 1]], [[0, 1, 23, 1, 1]], [[0, 0, 10, 1, 1], [0, 11, 13, 1, 1]], [[7, 0, 24, 1, 1]]),
        *([[0, 0, 12, 2, 1]], [[0, 0, 0, 1, 1]], [[0, 0, 24]], [["0", "0", "24", "1", "1"]], 5),
    ],
)
def test_an_index_that_is_not_true(world, saved, ranges):
    tensors = json.loads((saved / "state.json").read_text())["tensors"]
    tensors["model.deep"]["ranges"] = ranges
    change_state(saved, tensors=tensors)
    assert f"cannot read the tensors of {saved}" in refusal(saved, world)
