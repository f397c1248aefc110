"""Shards hold every file's bytes once, at the place the manifest says, and are never written over."""

import hashlib
import json
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import pytest

from data_prep import shard, writer
from data_prep.sources import encode_key
from gcvit.data.manifest import read_manifest
from gcvit.errors import UserError


def run(*arguments: object) -> None:
    shard.main([*map(str, arguments), "--workers", "1"])


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_file_is_in_the_shards_once_at_its_offset(tree, tmp_path):
    out = tmp_path / "out"
    run(tree, out, "--shard-size", 5)
    manifest = read_manifest(out)
    assert [(s.name, s.num_samples) for s in manifest.shards] == [
        (f"train-{i:06d}.tar", n) for i, n in enumerate((5, 5, 2))
    ]
    paths = []
    for number, (entry, first) in enumerate(zip(manifest.shards, manifest.first, strict=False)):
        data = (out / entry.name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry.sha256
        with tarfile.open(out / entry.name) as tar:
            members = tar.getmembers()
            assert {(m.mtime, m.uid, m.gid, m.mode, m.type) for m in members} == {(0, 0, 0, 0o644, tarfile.REGTYPE)}
            for i in range(entry.num_samples):
                image, cls, about = members[3 * i : 3 * i + 3]
                index = first + i
                said = json.loads(tar.extractfile(about).read())
                original = (tree / said["path"]).read_bytes()
                offset, length = manifest.offset[index], manifest.length[index]
                assert data[offset : offset + length] == original
                assert (image.offset_data, zlib.crc32(original)) == (offset, manifest.crc32[index])
                assert tar.extractfile(cls).read() == str(manifest.label[index]).encode()
                assert (said["label"], said["class"]) == (manifest.label[index], "abc"[manifest.label[index]])
                assert said["key"] == encode_key(said["path"])
                extension = "png" if said["path"] == "b/0.jpg" else "jpg"
                assert [m.name for m in (image, cls, about)] == [
                    f"{said['key']}.{e}" for e in (extension, "cls", "json")
                ]
                assert manifest.member_name(index) == f"train-{number:06d}.tar: {image.name}"
                paths.append(said["path"])
    assert sorted(paths) == sorted(str(path.relative_to(tree)) for path in tree.rglob("*.jpg"))
    assert paths != sorted(paths)


def test_the_standard_library_would_write_the_same_tar(tree, tmp_path):
    run(tree, tmp_path / "out")
    ours = tmp_path / "out/train-000000.tar"
    with (
        tarfile.open(ours) as tar,
        tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.USTAR_FORMAT) as theirs,
    ):
        for member in tar:
            info = tarfile.TarInfo(member.name)
            info.size = member.size
            theirs.addfile(info, tar.extractfile(member))
    assert ours.read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_names_of_any_length_and_script(tree, tmp_path):
    odd = ["日本" * 40 + ".jpg", "x" * 200 + ".jpg", "a b.c.jpg"]
    for number, name in enumerate(odd):
        (tree / f"a/{number}.jpg").rename(tree / "a" / name)
    run(tree, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:
        images = [m for m in tar if not m.name.endswith((".cls", ".json"))]
    assert [m.offset_data for m in images] == manifest.offset.tolist()
    assert {encode_key(f"a/{name}") + ".jpg" for name in odd} <= {m.name for m in images}


def test_each_shard_is_a_fair_sample_of_the_classes(tmp_path, make_image):
    data = make_image(0)
    for name in "ab":
        (tmp_path / "tree" / name).mkdir(parents=True)
        for i in range(100):
            (tmp_path / "tree" / name / f"{i}.jpg").write_bytes(data)
    run(tmp_path / "tree", tmp_path / "out", "--shard-size", 50)
    manifest = read_manifest(tmp_path / "out")
    for begin, end in zip(manifest.first[:-1], manifest.first[1:], strict=True):
        # Hypergeometric with mean 25 and deviation 3.1: four deviations either way.
        assert 13 <= Counter(manifest.label[begin:end].tolist())[0] <= 37


def test_the_seed_changes_the_order(tree, tmp_path):
    run(tree, tmp_path / "0")
    run(tree, tmp_path / "1", "--seed", 1)
    labels = [read_manifest(tmp_path / seed).label.tolist() for seed in "01"]
    assert labels[0] != labels[1]
    assert sorted(labels[0]) == sorted(labels[1])


def test_two_splits_get_two_folders(tree, tmp_path, make_image):
    both = tmp_path / "both"
    both.mkdir()
    tree.rename(both / "train")
    (both / "val/c").mkdir(parents=True)
    (both / "val/c/v.jpg").write_bytes(make_image(99))
    run(both, tmp_path / "out")
    val = read_manifest(tmp_path / "out/val")
    assert (val.split, val.classes, val.label.tolist()) == ("val", ("a", "b", "c"), [2])
    assert read_manifest(tmp_path / "out/train").num_samples == 12


def test_a_second_call_says_so_and_writes_nothing(tree, tmp_path, capsys):
    run(tree, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    run(tree, tmp_path / "out")
    assert "there already, byte for byte" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("change", ["seed", "content", "new file", "foreign file", "split", "inside", "file"])
def test_nothing_is_overwritten(tree, tmp_path, make_image, change):
    out = tmp_path / "out"
    arguments: list[object] = []
    if change == "foreign file":
        out.mkdir()
        (out / "precious.txt").write_text("mine")
    elif change == "inside":
        out = tree / "a"
    elif change == "file":
        out.write_text("mine")
    else:
        run(tree, out)
        if change == "seed":
            arguments = ["--seed", 1]
        elif change == "split":
            arguments = ["--split", "val"]
        elif change == "content":  # as many bytes, one of them another
            data = bytearray((tree / "a/1.jpg").read_bytes())
            data[-5] ^= 1
            (tree / "a/1.jpg").write_bytes(data)
        else:
            (tree / "a/new.jpg").write_bytes(make_image(77))
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="cure"):
        run(tree, out, *arguments)
    assert snapshot(tmp_path) == before


def test_an_interrupted_run_is_finished_but_not_by_another_plan(tree, tmp_path, monkeypatch):
    run(tree, tmp_path / "whole", "--shard-size", 5)
    original = writer.write_shard

    def interrupt(task):
        if task.tar_path.name == "train-000001.tar":
            Path(f"{task.tar_path}.tmp").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        return original(task)

    monkeypatch.setattr(shard, "write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tree, tmp_path / "out", "--shard-size", 5)
    monkeypatch.undo()
    before = snapshot(tmp_path / "out")
    assert sorted(before) == [".sharding.json", "train-000000.tar", "train-000001.tar.tmp"]
    with pytest.raises(UserError, match="interrupted sharding of other files or options"):
        run(tree, tmp_path / "out", "--shard-size", 6)
    assert snapshot(tmp_path / "out") == before
    run(tree, tmp_path / "out", "--shard-size", 5)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff\xe0"])
def test_a_file_that_is_no_image_is_named_and_leaves_nothing(tree, tmp_path, data):
    (tree / "b/notes.jpg").write_bytes(data)
    with pytest.raises(UserError, match=r"no image: got .*b/notes\.jpg \(.*allowed: JPEG.*cure"):
        run(tree, tmp_path / "out", "--shard-size", 3)
    assert snapshot(tmp_path / "out") == {}
    (tree / "b/notes.jpg").unlink()
    run(tree, tmp_path / "out", "--shard-size", 3)
    assert read_manifest(tmp_path / "out").num_samples == 12


def test_a_write_that_fails_is_explained(tree, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write a shard.*train-000000\.tar\.tmp \(No space left.*cure"):
        run(tree, tmp_path / "out")


@pytest.mark.parametrize("option", ["--workers=0", "--shard-size=0", "--seed=-1"])
def test_options_out_of_range_are_refused(tree, tmp_path, option):
    with pytest.raises(UserError, match="allowed"):
        shard.main([str(tree), str(tmp_path / "out"), option])
    assert not (tmp_path / "out").exists()
