"""timm's reader of tars finds the splits by `_info.json`."""

import json
import os

import pytest

from data_prep import shard
from data_prep.shards.timm_info import NAME, write_timm_info
from gcvit.errors import UserError
from gcvit.runtime import atomic_write


@pytest.mark.parametrize("has_splits", [True, False])
def test_timm_finds_every_sample_once(tree, tmp_path, has_splits):
    timm_data = pytest.importorskip("timm.data")
    if has_splits:
        (tmp_path / "both").mkdir()
        (tree / "c").rename(tmp_path / "c")
        tree.rename(tmp_path / "both/train")
        (tmp_path / "both/val").mkdir()
        (tmp_path / "c").rename(tmp_path / "both/val/a")
    out = tmp_path / "out"
    shard.main([str(tmp_path / "both" if has_splits else tree), str(out), "--shard-size", "4", "--workers", "1"])
    expected = {"train": 9, "val": 3, "validation": 3} if has_splits else {"train": 12}
    for split, num_samples in expected.items():
        dataset = timm_data.create_dataset("wds/", root=str(out), split=split, is_training=False)
        samples = list(dataset)
        assert len(dataset) == len(samples) == num_samples
        labels = [label for _, label in samples]
        assert sorted(labels) == ([0] * 3 if split.startswith("val") else [0] * 5 + [1] * 4 + [2] * (num_samples - 9))
        assert all(image.size == (11, 9) for image, _ in samples)


def test_twice_is_once_and_without_splits_is_nothing(tree, tmp_path):
    write_timm_info(tmp_path)
    assert not (tmp_path / NAME).exists()
    shard.main([str(tree), str(tmp_path / "out"), "--workers", "1"])
    before = (tmp_path / "out" / NAME).stat()
    write_timm_info(tmp_path / "out")
    assert (tmp_path / "out" / NAME).stat() == before
    assert json.loads((tmp_path / "out" / NAME).read_bytes())["splits"]["train"]["shard_lengths"] == [12]


def test_other_folders_beside_the_splits_are_not_looked_at(tree, tmp_path):
    out = tmp_path / "out"
    shard.main([str(tree), str(out / "zoo"), "--shard-size", "4", "--workers", "1"])
    (out / "app").mkdir()
    (out / "app/manifest.json").write_text('{"name": "a web application"}')
    write_timm_info(out)
    assert not (out / NAME).exists()
    (tmp_path / "both").mkdir()
    tree.rename(tmp_path / "both/train")
    shard.main([str(tmp_path / "both"), str(out), "--workers", "1"])
    splits = json.loads((out / NAME).read_bytes())["splits"]
    assert {name: split["filenames"] for name, split in splits.items()} == {"train": ["train/train-000000.tar"]}


def test_a_malformed_manifest_of_a_split_is_refused(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val/manifest.json").write_text('{"name": "a web application"}')
    with pytest.raises(UserError, match=r"the manifest is malformed: .*val/manifest\.json"):
        write_timm_info(tmp_path)


def test_a_process_that_removes_temporary_files_at_the_same_time_does_no_harm(tree, tmp_path, monkeypatch):
    """Two processes that complete the same shards: each removes what a killed one may have left."""
    out = tmp_path / "out"
    shard.main([str(tree), str(out), "--workers", "1"])
    text = (out / NAME).read_text()
    (out / NAME).unlink()
    fsync, num_removed = os.fsync, 0

    def remove_and_flush(descriptor: int) -> None:
        nonlocal num_removed
        for path in out.glob(f"{NAME}.*.tmp"):
            if num_removed < 2:
                path.unlink()
                num_removed += 1
        fsync(descriptor)

    monkeypatch.setattr(atomic_write.os, "fsync", remove_and_flush)
    write_timm_info(out)
    assert (num_removed, (out / NAME).read_text()) == (2, text)
    num_removed = -1  # once more than is tried
    (out / NAME).unlink()
    with pytest.raises(UserError, match="cannot write timm's list of shards"):
        write_timm_info(out)
