"""Corruption in the stream: replaced in training, an error or left out in evaluation, and always told."""

import itertools
import multiprocessing
import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gcvit.data.loader import eval_stream
from gcvit.data.source import open_source
from gcvit.errors import UserError
from tests.helpers.streaming import NUM_TRAIN, PLAIN, assert_equal_rows, by_position, make_config, take_steps


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_corrupt_sample_is_replaced_and_told(image_tree, tmp_path, num_workers):
    root = shutil.copytree(image_tree, tmp_path / "copy")
    (root / "train" / "bee" / "001.jpg").write_text("I am no image")
    source = open_source(root, "train")
    bad = next(index for index in range(NUM_TRAIN) if source.name(index) == "bee/001.jpg")
    # Sizes make runs: give the old one, so that the order is the reference's.
    source.length[bad] = (image_tree / "train" / "bee" / "001.jpg").stat().st_size
    steps = take_steps(source, make_config(num_workers=num_workers), 4)  # an epoch and a sample
    corrupt = [corruption for step in steps for batch in step for corruption in batch.corrupt]
    assert {(corruption.sample, corruption.where) for corruption in corrupt} == {(bad, "bee/001.jpg")}
    assert all(corruption.reason for corruption in corrupt)
    replaced = []
    intact = take_steps(open_source(image_tree, "train"), make_config(), 4)
    for step, other in zip(steps, intact, strict=True):
        rows, expected = by_position(step), by_position(other)
        replaced += [rows[position] for position in rows if not torch.equal(rows[position][0], expected[position][0])]
    assert len(replaced) == len(corrupt) in (1, 2)
    again = take_steps(source, make_config(), 4)
    for one, other in zip(steps, again, strict=True):
        assert_equal_rows(by_position(one), by_position(other))


def test_evaluation_names_the_cure_for_a_file(image_tree, tmp_path):
    """Which is no shard, that data_prep could mend."""
    root = shutil.copytree(image_tree, tmp_path / "copy")
    (root / "train" / "bee" / "001.jpg").write_text("I am no image")
    sizes = {"img_size": 32, "batch_size": 7, "world_size": 1, "rank": 0}
    with pytest.raises(UserError, match=r"corrupt: got bee/001\.jpg .*hint: replace the file; --skip-corrupt"):
        list(eval_stream(open_source(root, "train"), make_config(augment=PLAIN).data, **sizes))


def test_nothing_but_corruption_ends_with_an_error(image_tree, tmp_path):
    root = shutil.copytree(image_tree, tmp_path / "copy")
    for file in (root / "train").rglob("*.jpg"):
        file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match=r"100 samples in a row are corrupt: got .*\.jpg \(") as caught:
        take_steps(open_source(root, "train"), make_config(num_workers=1), 1)
    assert caught.value.rank_local
    assert not multiprocessing.active_children()  # though the error is still held


def test_a_missing_shard_is_an_error_at_once(shard_dir):
    source = open_source(shard_dir, "train")
    (shard_dir / "train" / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"cannot read a sample: got train-000001.tar: .*No such file") as caught:
        take_steps(source, make_config(), 5)
    assert caught.value.rank_local


@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_corruption_told_is_the_corruption_done(shard_dir, tmp_path_factory, data):
    """Bytes of images flipped, and shards cut at any block: each corrupt sample is told, and no other."""
    root = shutil.copytree(shard_dir, tmp_path_factory.mktemp("corruption") / "copy")
    source = open_source(root, "train")
    offset, length = source._manifest.offset.astype(int), source.length.astype(int)
    shard_of = np.searchsorted(source.first, np.arange(NUM_TRAIN), side="right") - 1
    bad = set()
    for index in data.draw(st.sets(st.integers(0, NUM_TRAIN - 1), max_size=5)):
        at = int(offset[index]) + data.draw(st.integers(0, int(length[index]) - 1))
        path = root / "train" / source._manifest.shards[shard_of[index]].name
        content = bytearray(path.read_bytes())
        content[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        bad.add(index)
    if (cut := data.draw(st.none() | st.integers(0, 3))) is not None:
        path = root / "train" / source._manifest.shards[cut].name
        size = data.draw(st.integers(0, path.stat().st_size // 512)) * 512
        os.truncate(path, size)
        bad |= set(np.flatnonzero((shard_of == cut) & (offset + length > size)).tolist())
    batches = itertools.chain(*take_steps(source, make_config(NUM_TRAIN, augment=PLAIN), 1))
    corrupt = [corruption.sample for batch in batches for corruption in batch.corrupt]
    assert set(corrupt) == bad
    assert len(corrupt) >= len(bad)  # a corrupt one may be drawn as a replacement as well
    config = make_config(augment=PLAIN)
    sizes = {"img_size": 32, "batch_size": 7, "world_size": 1, "rank": 0}
    evaluated = list(eval_stream(source, config.data, **sizes, skip_corrupt=True))
    assert sorted(corruption.sample for batch in evaluated for corruption in batch.corrupt) == sorted(bad)
    counted = torch.cat([batch.indices[batch.valid] for batch in evaluated]).tolist()
    assert sorted(counted) == sorted(set(range(NUM_TRAIN)) - bad)
    if bad:
        with pytest.raises(UserError, match=r"a sample is corrupt.*--skip-corrupt"):
            list(eval_stream(source, config.data, **sizes))
