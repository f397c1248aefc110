"""Shards hold every file's bytes once, at the place the manifest says, and are never written over."""

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep import index, shard
from data_prep.shards import direct_io, tar_writer
from data_prep.shards.tar_writer import encode_key
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


@pytest.mark.parametrize("change", ["seed", "content", "new file", "other file", "split", "inside", "file"])
def test_nothing_is_overwritten(tree, tmp_path, make_image, change):
    out = tmp_path / "out"
    arguments: list[object] = []
    if change == "other file":
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
    with pytest.raises(UserError, match="hint"):
        run(tree, out, *arguments)
    assert snapshot(tmp_path) == before


def interrupt_at(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next run die when it comes to the shard `name`."""
    original = tar_writer.write_shard

    def write(task):
        if task.tar_path.name == name:
            Path(f"{task.tar_path}.01234567.tmp").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        return original(task)

    monkeypatch.setattr(shard, "write_shard", write)


def test_an_interrupted_run_is_finished_but_not_by_another_plan(tree, tmp_path, monkeypatch, capsys):
    run(tree, tmp_path / "whole", "--shard-size", 5)
    with monkeypatch.context() as patch:
        interrupt_at("train-000001.tar", patch)
        with pytest.raises(KeyboardInterrupt):
            run(tree, tmp_path / "out", "--shard-size", 5)
    before = snapshot(tmp_path / "out")
    assert sorted(before) == [
        ".sharding.json",
        "train-000000.tar",
        "train-000000.tar.json",
        "train-000001.tar.01234567.tmp",
    ]
    for options in (["--shard-size", 6], ["--shard-size", 5, "--seed", 1], ["--shard-size", 5, "--short-side", 8]):
        with pytest.raises(UserError, match="interrupted sharding of other files or options"):
            run(tree, tmp_path / "out", *options)
        assert snapshot(tmp_path / "out") == before
    first = (tmp_path / "out/train-000000.tar").stat()
    capsys.readouterr()
    run(tree, tmp_path / "out", "--shard-size", 5)
    assert "train: 1 of 3 shards are complete already" in capsys.readouterr().out
    assert (tmp_path / "out/train-000000.tar").stat() == first, "a complete shard was written again"
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


@pytest.mark.parametrize("parts", [["0/1"], ["0/2", "1/2"]])
def test_index_misses_the_val_that_a_killed_run_did_not_come_to(tree, tmp_path, make_image, monkeypatch, parts):
    (tmp_path / "both/val/c").mkdir(parents=True)
    tree.rename(tmp_path / "both/train")
    (tmp_path / "both/val/c/v.jpg").write_bytes(make_image(99))
    run(tmp_path / "both", tmp_path / "whole", "--shard-size", 5)
    write_plan = shard.write_plan

    def write(plan, part, num_workers):
        if plan.source.split == "val":
            raise KeyboardInterrupt
        return write_plan(plan, part, num_workers)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shard, "write_plan", write)
        for part in parts:
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "both", out, "--shard-size", 5, "--part", part)
    with pytest.raises(UserError, match=r"1 of 1 shards are not complete: .*val: got val-000000\.tar"):
        index.main([str(out), "--workers", "1"])
    for part in parts:
        run(tmp_path / "both", out, "--shard-size", 5, "--part", part)
    index.main([str(out), "--workers", "1"])
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_a_run_killed_while_it_tidies_up_is_finished(tree, tmp_path):
    run(tree, tmp_path / "out", "--shard-size", 5)
    whole = snapshot(tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    run(tree, tmp_path / "out", "--shard-size", 5, "--part", "0/1")
    assert snapshot(tmp_path / "out") == whole
    (tmp_path / "out/.sharding.json").write_text("{}")
    (tmp_path / "out/train-000001.tar.json").write_text("{}")
    run(tree, tmp_path / "out", "--shard-size", 5)
    assert snapshot(tmp_path / "out") == whole


@pytest.mark.parametrize("parts", [["0/2", "1/2"], ["2/3", "0/3", "1/3"], [f"{i}/5" for i in range(5)]])
def test_parts_make_the_same_bytes_in_any_order(tree, tmp_path, parts, capsys):
    run(tree, tmp_path / "whole", "--shard-size", 5)
    out = tmp_path / "out"
    for number, part in enumerate(parts):
        run(tree, out, "--shard-size", 5, "--part", part)
        assert f"part {part} is complete" in capsys.readouterr().out
        assert len(list(out.glob("*.tar"))) == sum(
            len(range(int(text[0]), 3, len(parts))) for text in parts[: number + 1]
        )
        if number == 0:
            with pytest.raises(UserError, match=r"[12] of 3 shards are not complete"):
                index.main([str(out), "--workers", "1"])
    assert not (out / "manifest.json").exists()
    index.main([str(out), "--workers", "1"])
    assert snapshot(out) == snapshot(tmp_path / "whole")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    for part in parts:
        run(tree, out, "--shard-size", 5, "--part", part)
    index.main([str(out), "--workers", "1"])
    assert {path: path.stat().st_mtime_ns for path in out.iterdir() if path.suffix == ".tar"} == {
        path: time for path, time in before.items() if path.suffix == ".tar"
    }
    assert snapshot(out) == snapshot(tmp_path / "whole")


@given(st.integers(0, 300), st.integers(1, 64))
def test_every_shard_belongs_to_one_part(num_shards, num_parts):
    owned = [shard.parse_part(f"{index}/{num_parts}").shard_numbers(num_shards) for index in range(num_parts)]
    assert sorted(number for numbers in owned for number in numbers) == list(range(num_shards))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


@pytest.mark.parametrize("text", ["2/2", "0", "0/0", "-1/2", "1/2/3", "a/b", "/", "1.0/2", ""])
def test_what_is_no_part_is_refused(tree, tmp_path, text):
    with pytest.raises(UserError, match="--part is no part"):
        run(tree, tmp_path / "out", f"--part={text}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff\xe0"])
def test_files_that_are_no_images_are_all_named_and_the_other_shards_stay(tree, tmp_path, make_image, data):
    bad = {name: (tree / name).read_bytes() for name in ("b/1.jpg", "c/2.jpg")}
    run(tree, tmp_path / "whole", "--shard-size", 1)
    for name in bad:
        (tree / name).write_bytes(data)
    with pytest.raises(UserError, match=r"2 files are no images: got .*b/1\.jpg \(.*c/2\.jpg \(.*expected: JPEG.*hint"):
        run(tree, tmp_path / "out", "--shard-size", 1)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 10
    assert not list((tmp_path / "out").glob("*.tmp"))
    for name, good in bad.items():
        (tree / name).write_bytes(good)
    run(tree, tmp_path / "out", "--shard-size", 1)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_an_image_that_cannot_be_read_is_named(tree, tmp_path):
    (tree / "b/1.jpg").unlink()
    (tree / "b/1.jpg").symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match=r"a file is no image: got .*b/1\.jpg \(No such file"):
        run(tree, tmp_path / "out")


def test_a_write_that_fails_is_explained_and_complete_shards_stay(tree, tmp_path, monkeypatch):
    fsync, num_calls = os.fsync, 0

    def full(descriptor):
        nonlocal num_calls
        num_calls += 1
        if num_calls > 1:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    run(tree, tmp_path / "whole", "--shard-size", 5)
    with monkeypatch.context() as patch:
        patch.setattr(direct_io.os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot write a shard.*train-000001\.tar \(No space left.*hint"):
            run(tree, tmp_path / "out", "--shard-size", 5)
    assert sorted(snapshot(tmp_path / "out")) == [".sharding.json", "train-000000.tar", "train-000000.tar.json"]
    run(tree, tmp_path / "out", "--shard-size", 5)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def photograph(width: int, height: int, mode: str = "RGB", kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), 100 if mode == "L" else None).save(buffer, kind)
    return buffer.getvalue()


def test_large_images_are_re_encoded_and_small_ones_are_not(tree, tmp_path, capsys):
    large = photograph(300, 200)
    (tree / "a/0.jpg").write_bytes(large)
    run(tree, tmp_path / "out", "--short-side", 50, "--quality", 80)
    manifest = read_manifest(tmp_path / "out")
    tar = (tmp_path / "out/train-000000.tar").read_bytes()
    images = [tar[o : o + n] for o, n in zip(manifest.offset.tolist(), manifest.length.tolist(), strict=True)]
    [reduced] = set(images) - {path.read_bytes() for path in tree.rglob("*.jpg")}
    assert Image.open(io.BytesIO(reduced)).size == (75, 50)
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:6] == ["split", "samples", "classes", "shards", "bytes", "saved"]
    assert table[1].split()[:6] == ["train", "12", "3", "1", f"{len(tar):,}", f"{len(large) - len(reduced):,}"]
    with pytest.raises(UserError, match="other shards"):
        run(tree, tmp_path / "out", "--short-side", 50, "--quality", 81)
    with pytest.raises(UserError, match="other shards"):
        run(tree, tmp_path / "out")


def test_cmyk_and_pngs_that_call_themselves_jpeg_keep_their_bytes(tree, tmp_path, capsys):
    odd = {"a/0.jpg": photograph(40, 30, "CMYK"), "a/1.jpg": photograph(40, 30, "RGB", "PNG")}
    for name, data in odd.items():
        (tree / name).write_bytes(data)
    run(tree, tmp_path / "out")
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:
        assert tar.extractfile("a/0.jpg").read() == odd["a/0.jpg"]
        assert tar.extractfile("a/1.png").read() == odd["a/1.jpg"]
    assert "saved" not in capsys.readouterr().out


def test_quality_without_a_short_side_is_refused(tree, tmp_path):
    with pytest.raises(UserError, match=r"--quality has no effect.*add --short-side"):
        run(tree, tmp_path / "out", "--quality", 80)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option", ["--workers=0", "--shard-size=0", "--seed=-1", "--short-side=0", "--short-side=9 --quality=101"]
)
def test_options_out_of_range_are_refused(tree, tmp_path, option):
    with pytest.raises(UserError, match="expected"):
        shard.main([str(tree), str(tmp_path / "out"), *option.split()])
    assert not (tmp_path / "out").exists()
