"""verify passes sound shards, and names each sample whose bytes, label or place is wrong."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest

from data_prep import shard, verify
from gcvit.data.manifest import COLUMNS, Manifest, read_manifest, write_manifest
from gcvit.errors import UserError


@pytest.fixture
def out(tree: Path, tmp_path: Path) -> Path:
    shard.main([str(tree), str(tmp_path / "out"), "--shard-size", "5", "--workers", "1"])
    return tmp_path / "out"


def problems_of(out: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    with pytest.raises(UserError, match="damaged"):
        verify.main([str(out), "--workers", "1"])
    return capsys.readouterr().out.splitlines()[:-1]


def replace(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def rewrite(manifest: Manifest, **changes: np.ndarray) -> None:
    """Write the manifest anew, in keeping with the shards as they are now."""
    shards = []
    for entry in manifest.shards:
        data = (manifest.root / entry.name).read_bytes()
        shards.append(dataclasses.replace(entry, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    columns = {name: np.array(getattr(manifest, name)) for name in COLUMNS} | changes
    write_manifest(manifest.root, manifest.split, manifest.classes, shards, columns)


def test_sound_shards_pass(out, capsys):
    verify.main([str(out), "--workers", "1"])
    assert "train: 12 samples of 3 classes in 3 shards, all sound" in capsys.readouterr().out


def test_a_flipped_byte_of_an_image_is_found(out, capsys):
    manifest = read_manifest(out)
    place = int(manifest.offset[6] + manifest.length[6] // 2)
    path = out / manifest.shards[1].name
    replace(path, place, bytes([path.read_bytes()[place] ^ 0x10]))
    lines = problems_of(out, capsys)
    name = manifest.member_name(6).split(": ")[1]
    assert any(f"{path}: SHA-256" in line for line in lines)
    assert any(f"{path}: {name}: crc32" in line for line in lines)


def test_a_flipped_bit_anywhere_in_a_shard_is_found(out, capsys):
    path = out / "train-000002.tar"
    sound = path.read_bytes()
    for place in np.random.RandomState(0).choice(len(sound), 40, replace=False):
        replace(path, int(place), bytes([sound[place] ^ 1]))
        assert problems_of(out, capsys)
        path.write_bytes(sound)


def test_an_image_that_was_truncated_before_sharding_is_found(tree, tmp_path, capsys):
    path = tree / "c/1.jpg"
    path.write_bytes(path.read_bytes()[:-100])  # the header is whole, so sharding takes it
    shard.main([str(tree), str(tmp_path / "out"), "--workers", "1"])
    [line] = problems_of(tmp_path / "out", capsys)
    assert "c/1.jpg: does not decode: image file is truncated" in line


def test_labels_and_places_that_disagree_are_found(out, capsys):
    manifest = read_manifest(out)
    label, offset = np.array(manifest.label), np.array(manifest.offset)
    label[3] = (label[3] + 1) % 3
    offset[8] += 512
    names = [manifest.member_name(i).split(": ")[1] for i in (3, 8)]
    rewrite(manifest, label=label, offset=offset)
    lines = problems_of(out, capsys)
    assert len(lines) == 3
    assert f"{names[0]}: .cls says" in lines[0]
    assert f"{names[0]}: .json says" in lines[1]
    assert f"{names[1]}: lies at" in lines[2]


def test_missing_and_surplus_members_are_found(out, capsys):
    manifest = read_manifest(out)
    path = out / "train-000000.tar"
    replace(path, int(manifest.offset[3]) - 512, bytes(1024))  # two empty blocks end a tar
    rewrite(manifest)
    assert any("ends after 3 samples instead of 5" in line for line in problems_of(out, capsys))
    (out / "train-000000.tar").write_bytes((out / "train-000001.tar").read_bytes())
    rewrite(manifest)
    assert any("crc32" in line for line in problems_of(out, capsys))


def test_a_truncated_tar_is_refused_at_once(out):
    path = out / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(UserError, match=r"train-000001\.tar is truncated"):
        verify.main([str(out), "--workers", "1"])


def test_a_truncated_tar_is_found_though_the_manifest_agrees(out, capsys):
    manifest = read_manifest(out)
    path = out / "train-000001.tar"
    path.write_bytes(path.read_bytes()[: int(manifest.offset[7]) + 5])
    rewrite(manifest)
    assert any("cannot be read on after 3 samples" in line for line in problems_of(out, capsys))


def test_folders_without_shards_are_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="no shards here"):
            verify.main([str(folder)])
    (tmp_path / "val").mkdir()
    (tmp_path / "val/val-000000.tar").write_bytes(b"x")
    with pytest.raises(UserError, match="without a manifest"):
        verify.main([str(tmp_path)])
