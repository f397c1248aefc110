"""The manifest gives back what was written, and refuses what does not fit its shards."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from gcvit.data.manifest import (
    COLUMNS,
    Manifest,
    Shard,
    column_path,
    find_split,
    read_manifest,
    write_manifest,
)
from gcvit.errors import UserError

CLASSES = ("cat", "dog")


def write_split(folder: Path, split: str = "train") -> dict[str, np.ndarray]:
    """Two shards of 3 and 2 samples with known bytes; returns the columns."""
    folder.mkdir(parents=True)
    shards = []
    rows = []
    for number, size in enumerate((3, 2)):
        path = folder / f"{split}-{number:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(size):
                info = tarfile.TarInfo(f"cat/{number}{i}.jpg")
                info.size = 10 + i
                tar.addfile(info, io.BytesIO(bytes(info.size)))
                rows.append((tar.offset - tarfile.BLOCKSIZE, info.size, i % 2, 7 + i))
        shards.append(Shard(path.name, size, path.stat().st_size, "0" * 64))
    values = zip(*rows, strict=True)
    columns = {name: np.array(column, dtype) for (name, dtype), column in zip(COLUMNS.items(), values, strict=True)}
    write_manifest(folder, split, CLASSES, shards, columns)
    return columns


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_split(tmp_path / "train")
    return tmp_path / "train"


def test_round_trip(tmp_path):
    columns = write_split(tmp_path / "train")
    manifest = read_manifest(tmp_path / "train")
    assert (manifest.split, manifest.classes, manifest.num_samples) == ("train", CLASSES, 5)
    assert [shard.num_samples for shard in manifest.shards] == [3, 2]
    assert manifest.first.tolist() == [0, 3, 5]
    for name, written in columns.items():
        column = getattr(manifest, name)
        assert isinstance(column, np.memmap)
        assert column.dtype == COLUMNS[name]
        assert not column.flags.writeable
        np.testing.assert_array_equal(column, written)
    assert not list((tmp_path / "train").glob("*.tmp"))


def test_member_names_come_from_the_tars_and_survive_corruption(folder):
    manifest = read_manifest(folder)
    names = [manifest.member_name(i) for i in range(5)]
    assert names[2:4] == ["train-000000.tar: cat/02.jpg", "train-000001.tar: cat/10.jpg"]
    (folder / "train-000001.tar").unlink()
    (folder / "train-000000.tar").write_bytes(b"x" * 4096)
    assert manifest.member_name(4) == "train-000001.tar: sample 4"
    assert manifest.member_name(0) == "train-000000.tar: sample 0"


def test_the_digest_names_the_data(folder):
    manifest = read_manifest(folder)
    columns = {name: np.array(getattr(manifest, name)) for name in COLUMNS}

    def digest(**changes) -> str:
        parts = {"root": Path("elsewhere"), "split": "train", "classes": CLASSES, "shards": manifest.shards}
        return Manifest(**(parts | columns | changes)).digest

    assert digest() == manifest.digest
    changes = [{"split": "val"}, {"classes": ("dog", "cat")}, {"shards": manifest.shards[::-1]}]
    changes += [{name: column[::-1].copy()} for name, column in columns.items()]
    digests = [digest(**change) for change in changes] + [manifest.digest]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("name", list(COLUMNS))
@pytest.mark.parametrize(
    "corruption", ["missing", "empty", "truncated", "flipped", "longer", "float", "pickled", "zip"]
)
def test_a_corrupt_column_is_refused_by_name(folder, name, corruption):
    path = column_path(folder, name)
    data = path.read_bytes()
    column = np.load(path)
    if corruption == "missing":
        path.unlink()
    elif corruption == "longer":
        np.save(path, np.concatenate([column, column[:1]]))
    elif corruption == "float":
        np.save(path, column.astype(np.float32))
    elif corruption == "pickled":
        np.save(path, np.array([{}] * 5, object), allow_pickle=True)
    elif corruption == "zip":
        np.savez(path.with_suffix(".npz"), column)
        path.with_suffix(".npz").rename(path)
    else:
        changed = {"empty": b"", "truncated": data[:-1], "flipped": data[:-1] + bytes([data[-1] ^ 1])}
        path.write_bytes(changed[corruption])
    with pytest.raises(UserError, match=rf"column of the manifest is .*{path.name}.*hint"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "malformed.*version"),
        ({"digest": None}, "malformed.*digest"),
        ({"extra": 1}, "malformed.*extra"),
        ({"num_samples": 4}, "counts disagree.*got 4 samples, 5 in its shards"),
        ({"num_samples": "5"}, "malformed.*num_samples"),
        ({"shards": [{"name": "a.tar"}]}, "malformed.*shards"),
        ({"classes": ["dog", "cat"]}, "changed after it was written"),
        ({"split": "val"}, "changed after it was written"),
    ],
)
def test_a_changed_manifest_is_refused(folder, change, message):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_manifest_that_is_no_json_is_refused(folder, text):
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"malformed.*manifest\.json"):
        read_manifest(folder)


def test_a_shard_outside_the_folder_is_refused(folder):
    manifest = read_manifest(folder)
    columns = {name: getattr(manifest, name)[:3] for name in COLUMNS}
    write_manifest(folder, "train", CLASSES, [Shard("../x.tar", 3, 1, "")], columns)
    with pytest.raises(UserError, match=r"outside.*\.\./x.tar"):
        read_manifest(folder)


def test_missing_and_truncated_shards_are_named(folder):
    path = folder / "train-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:-512])
    with pytest.raises(UserError, match=rf"train-000001.tar is truncated: {len(data) - 512} bytes instead of"):
        read_manifest(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"train-000001.tar: No such file.*hint"):
        read_manifest(folder)
    (folder / "train-000000.tar").unlink()
    with pytest.raises(UserError, match="and 1 more shards"):
        read_manifest(folder)


def test_shards_without_a_manifest_and_compressed_ones_are_refused(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"without a manifest.*2 tars.*hint.*data_prep\.index"):
        read_manifest(folder)
    (folder / "train-000001.tar").rename(folder / "train-000001.tar.gz")
    with pytest.raises(UserError, match=r"compressed.*train-000001\.tar\.gz.*expected: \.tar;"):
        read_manifest(folder)
    with pytest.raises(UserError, match="no shards here"):
        read_manifest(folder.parent)


def test_find_split(tmp_path):
    assert find_split(tmp_path / "absent", "train") is None
    assert find_split(tmp_path, "train") is None
    write_split(tmp_path / "both/train")
    (tmp_path / "both/val/cat").mkdir(parents=True)
    assert find_split(tmp_path / "both", "train") == tmp_path / "both/train"
    assert find_split(tmp_path / "both", "val") is None  # class folders are not ours
    write_split(tmp_path / "one", "val")
    assert find_split(tmp_path / "one", "val") == tmp_path / "one"
    assert find_split(tmp_path / "one", "train") is None
    (tmp_path / "one/manifest.json").unlink()  # still found, so that read_manifest can explain
    assert find_split(tmp_path / "one", "val") == tmp_path / "one"
    assert find_split(tmp_path / "one", "train") is None
    assert find_split(tmp_path / "one/val-000000.tar", "train") is None


def test_the_manifest_loads_no_torch():
    code = "import sys, gcvit.data.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
