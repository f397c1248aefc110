import os
import pickle
import shutil

import numpy as np
import pytest

from gcvit.data import source as source_module
from gcvit.data.source import open_source
from gcvit.errors import UserError

CLASSES = ("ape", "bee", "cat")


def test_folder_source_reads_the_sorted_tree(image_tree):
    source = open_source(str(image_tree), "train")
    files = sorted((image_tree / "train").rglob("*.jpg"))
    assert source.classes == CLASSES
    assert source.num_samples == len(files) == 47
    assert [source.read(index) for index in range(47)] == [file.read_bytes() for file in files]
    assert [CLASSES[label] for label in source.label] == [file.parent.name for file in files]
    assert source.length.tolist() == [file.stat().st_size for file in files]
    assert source.name(0) == "ape/000.jpg"
    assert source.first.tolist() == [0, *np.cumsum(np.bincount(source.label))]


def test_shard_source_reads_the_same_samples(image_tree, shard_dir):
    folders, shards = open_source(image_tree, "train"), open_source(shard_dir, "train")
    assert shards.classes == folders.classes
    assert shards.first.tolist() == [0, 12, 24, 36, 47]

    def content(source):
        return sorted((source.read(index), source.label[index]) for index in range(source.num_samples))

    assert content(shards) == content(folders)
    assert shards.name(12) == "train-000001.tar: ape/005.jpg"


@pytest.mark.parametrize("kind", ["folders", "shards"])
def test_source_pickles(kind, image_tree, shard_dir):
    source = open_source(image_tree if kind == "folders" else shard_dir, "train")
    source.read(0)  # with files open
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301  (our own bytes)
    assert copy.digest == source.digest
    assert [copy.read(index) for index in (46, 3)] == [source.read(index) for index in (46, 3)]
    assert kind == "folders" or len(pickle.dumps(source)) < 2000


def test_few_files_are_open(shard_dir, monkeypatch):
    monkeypatch.setattr(source_module, "_MAX_OPEN_SHARDS", 2)
    source = open_source(shard_dir, "train")

    def open_shards():
        targets = [os.path.realpath(f"/proc/self/fd/{descriptor}") for descriptor in os.listdir("/proc/self/fd")]
        return sum(target.startswith(str(shard_dir)) and target.endswith(".tar") for target in targets)

    contents = [source.read(index) for index in (0, 13, 25, 40, 0)]
    assert contents[0] == contents[-1]
    assert open_shards() == 2
    del source
    assert open_shards() == 0


def test_digest_tells_data_apart(image_tree, tmp_path):
    copy = shutil.copytree(image_tree, tmp_path / "copy")
    digest = open_source(image_tree, "train").digest
    assert open_source(copy, "train").digest == digest
    (copy / "train" / "bee" / "001.jpg").rename(copy / "train" / "cat" / "001.jpg")
    assert open_source(copy, "train").digest != digest


def test_val_is_numbered_by_the_folders_of_train(image_tree, tmp_path):
    root = shutil.copytree(image_tree, tmp_path / "copy")
    shutil.rmtree(root / "val" / "bee")
    source = open_source(root, "val")
    assert source.classes == CLASSES
    assert set(source.label.tolist()) == {0, 2}
    (root / "val" / "dog").mkdir()
    with pytest.raises(UserError, match=r"1 class folders that train lacks.*dog"):
        open_source(root, "val")


def test_data_directory_errors(image_tree, tmp_path):
    with pytest.raises(UserError, match=r"data directory.*got .*nowhere \(missing\).*data_dir"):
        open_source(tmp_path / "nowhere", "train")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file"):
        open_source(tmp_path / "file", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no split 'train'.*an empty directory"):
        open_source(tmp_path / "empty", "train")
    with pytest.raises(UserError, match=r"no split 'test'.*train, val"):
        open_source(image_tree, "test")
    (tmp_path / "empty" / "train").mkdir()
    with pytest.raises(UserError, match="no class folders"):
        open_source(tmp_path / "empty", "train")
    root = shutil.copytree(image_tree, tmp_path / "copy")
    (root / "train" / "dog").mkdir()
    (root / "train" / "dog" / "README.txt").touch()
    with pytest.raises(UserError, match=r"class folder holds no images.*dog"):
        open_source(root, "train")


def test_shard_errors(shard_dir):
    train = shard_dir / "train"
    source = open_source(shard_dir, "train")
    tar = train / "train-000002.tar"
    content = bytearray(tar.read_bytes())
    os.truncate(tar, 4096)
    with pytest.raises(UserError, match=r"train-000002.tar is truncated"):
        open_source(shard_dir, "train")
    with pytest.raises(UserError, match=r"train-000002.tar.*0 of \d+ bytes"):
        source.read(34)
    content[int(source._manifest.offset[30]) + 99] ^= 1
    tar.write_bytes(content)
    source.read(29)
    with pytest.raises(UserError, match=r"train-000002.tar.*another checksum.*data_prep.verify"):
        source.read(30)
    tar.unlink()
    fresh = pickle.loads(pickle.dumps(source))  # noqa: S301
    with pytest.raises(UserError, match=r"train-000002.tar: sample 30 \(No such file"):
        fresh.read(30)
    (train / "manifest.json").unlink()
    with pytest.raises(UserError, match="shards without a manifest"):
        open_source(shard_dir, "train")
    for file in train.glob("*.tar"):
        file.rename(f"{file}.gz")
    with pytest.raises(UserError, match="compressed"):
        open_source(shard_dir, "train")
