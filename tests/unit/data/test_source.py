import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gcvit.data import source as source_module
from gcvit.data.manifest import write_manifest
from gcvit.data.source import CorruptSample, ShardSource, Source, open_source
from gcvit.errors import UserError

CLASSES = ("ape", "bee", "cat")


def read(source: Source, index: int) -> bytes:
    (content,) = source.fetch(index, index + 1)
    source.check(index, content)
    return bytes(content)


def test_folder_source_reads_the_sorted_tree(image_tree):
    source = open_source(str(image_tree), "train")
    files = sorted((image_tree / "train").rglob("*.jpg"))
    assert source.classes == CLASSES
    assert source.num_samples == len(files) == 47
    assert [read(source, index) for index in range(47)] == [file.read_bytes() for file in files]
    assert [CLASSES[label] for label in source.label] == [file.parent.name for file in files]
    assert source.length.tolist() == [file.stat().st_size for file in files]
    assert source.name(0) == "ape/000.jpg"
    assert source.first.tolist() == [0, *np.cumsum(np.bincount(source.label))]


def test_shard_source_reads_the_same_samples(image_tree, shard_dir):
    folders, shards = open_source(image_tree, "train"), open_source(shard_dir, "train")
    assert shards.classes == folders.classes
    assert shards.first.tolist() == [0, 12, 24, 36, 47]

    def content(source):
        return sorted((read(source, index), source.label[index]) for index in range(source.num_samples))

    assert content(shards) == content(folders)
    assert shards.name(12) == "train-000001.tar: ape/005.jpg"


@pytest.mark.parametrize("kind", ["folders", "shards"])
def test_source_pickles(kind, image_tree, shard_dir):
    source = open_source(image_tree if kind == "folders" else shard_dir, "train")
    read(source, 0)  # with files open
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301  (our own bytes)
    assert copy.digest == source.digest
    assert [read(copy, index) for index in (46, 3)] == [read(source, index) for index in (46, 3)]
    assert kind == "folders" or len(pickle.dumps(source)) < 2000


def test_few_files_are_open(shard_dir, monkeypatch):
    monkeypatch.setattr(source_module, "_MAX_OPEN_SHARDS", 2)
    source = open_source(shard_dir, "train")

    def open_shards():
        targets = [os.path.realpath(f"/proc/self/fd/{descriptor}") for descriptor in os.listdir("/proc/self/fd")]
        return sum(target.startswith(str(shard_dir)) and target.endswith(".tar") for target in targets)

    contents = [read(source, index) for index in (0, 13, 25, 40, 0)]
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
    (tmp_path / "imagenet").mkdir()
    for name in ("img_train.tar", "img_val.tar", "devkit_t12.tar.gz"):
        (tmp_path / "imagenet" / f"ILSVRC2012_{name}").touch()
    with pytest.raises(UserError, match=r"ImageNet's archives, not shards: got .*hint: python -m data_prep\.shard"):
        open_source(tmp_path / "imagenet", "train")
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
    with pytest.raises(CorruptSample, match=r"^0 of \d+ bytes"):
        read(source, 34)
    content[int(source._manifest.offset[30]) + 99] ^= 1
    tar.write_bytes(content)
    read(source, 29)
    with pytest.raises(CorruptSample, match=r"^another checksum"):
        read(source, 30)
    tar.unlink()
    fresh = pickle.loads(pickle.dumps(source))  # noqa: S301
    with pytest.raises(UserError, match=r"train-000002.tar: sample 30 \(No such file"):
        read(fresh, 30)
    (train / "manifest.json").unlink()
    with pytest.raises(UserError, match="shards without a manifest"):
        open_source(shard_dir, "train")
    for file in train.glob("*.tar"):
        file.rename(f"{file}.gz")
    with pytest.raises(UserError, match="compressed"):
        open_source(shard_dir, "train")


@given(data=st.data())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_run_is_what_its_samples_are(image_tree, shard_dir, data):
    for source in (open_source(image_tree, "train"), open_source(shard_dir, "train")):
        begin = data.draw(st.integers(0, 46))
        end = data.draw(st.integers(begin, 47))
        contents = source.fetch(begin, end)
        assert [bytes(content) for content in contents] == [read(source, index) for index in range(begin, end)]
        for index, content in zip(range(begin, end), contents, strict=True):
            source.check(index, content)


def test_a_run_is_one_read(shard_dir, monkeypatch):
    source = open_source(shard_dir, "train")
    reads = []
    monkeypatch.setattr(source_module.os, "preadv", lambda *place: reads.append(place[1:]) or preadv(*place))
    source.fetch(2, 9)  # of the first shard's 12
    assert len(reads) == 1
    # A header, and what fills the last block, of small images: of photographs' 110 kB they are little.
    assert len(reads[0][0][0]) <= source.length[2:9].sum() + 7 * 1024
    source.fetch(10, 14)
    assert len(reads) == 3  # two shards
    reads.clear()
    offset = source._manifest.offset.copy()
    offset[4:12] += 1_000_000  # something large between the images of another's tar
    monkeypatch.setattr(source, "_manifest", replace(source._manifest, offset=offset))
    source.fetch(2, 6)
    assert len(reads) == 4
    assert sum(len(buffer) for (buffer,), _ in reads) == source.length[2:6].sum()


def test_without_checksums_only_lengths_are_checked(shard_dir):
    source = open_source(shard_dir, "train")
    plain = ShardSource(replace(source._manifest, crc32=None))
    content = bytearray(read(plain, 3))
    content[50] ^= 1
    plain.check(3, memoryview(content))
    with pytest.raises(CorruptSample):
        source.check(3, memoryview(content))
    with pytest.raises(CorruptSample, match="of"):
        plain.check(3, memoryview(content)[:-1])
    write_manifest(shard_dir / "train", "train", plain.classes, plain._manifest.shards, plain._manifest.columns)
    again = pickle.loads(pickle.dumps(open_source(shard_dir, "train")))  # noqa: S301
    assert again._manifest.crc32 is None
    again.check(3, memoryview(content))


preadv = os.preadv
