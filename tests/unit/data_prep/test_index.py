"""index writes the manifest of tars that are there: merged from sidecars, or read from the tars of others."""

import io
import json
import os
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from data_prep import index, shard, verify
from gcvit.data.manifest import find_split, read_manifest
from gcvit.errors import UserError


def write_tar(path: Path, labels: list[int | str], make_image, first: int = 0) -> list[bytes]:
    """timm's style: KEY.cls, KEY.jpg, KEY.json in the order of their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [make_image(first + i) for i in range(len(labels))]
    with tarfile.open(path, "w") as tar:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            for name, data in (("cls", str(label).encode()), ("jpg", image), ("json", b'{"width": 11}')):
                info = tarfile.TarInfo(f"n{first + i:04d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return images


def run(folder: Path, *options: object) -> None:
    index.main([str(folder), "--workers", "1", *map(str, options)])


def images_of(folder: Path) -> list[bytes]:
    manifest = read_manifest(folder)
    found = []
    for i, entry in enumerate(manifest.shards):
        content = (folder / entry.name).read_bytes()
        for sample in range(manifest.first[i], manifest.first[i + 1]):
            begin = int(manifest.offset[sample])
            found.append(content[begin : begin + int(manifest.length[sample])])
    return found


@pytest.fixture
def others_tars(tmp_path: Path, make_image) -> Path:
    """A folder with both splits, as timm has them."""
    folder = tmp_path / "others"
    write_tar(folder / "imagenet1k-train-0000.tar", [2, 0, 1], make_image)
    write_tar(folder / "imagenet1k-train-0001.tar", [1, 1], make_image, 3)
    write_tar(folder / "imagenet1k-validation-00.tar", [0, 3], make_image, 5)
    return folder


def test_an_absurd_label_is_refused(tmp_path, make_image):
    """Classes without names are made for each label up to the largest."""
    write_tar(tmp_path / "x-train-0.tar", [0, 1, 1_000_000], make_image)
    with pytest.raises(UserError, match=r"x-train-0\.tar: n0002: its label is 1,000,000; .* below 1,000,000"):
        run(tmp_path)
    run(tmp_path, "--skip-unusable")
    assert read_manifest(tmp_path).classes == ("0000", "0001")
    verify.main([str(tmp_path), "--workers", "1"])


def test_both_splits_of_one_folder_are_indexed(others_tars, make_image, capsys):
    run(others_tars)
    said = capsys.readouterr().out
    assert "train: 5 samples in 2 tars" in said
    assert "val: 2 samples in 1 tars" in said
    assert "4 classes" in said
    for split, labels in (("train", [2, 0, 1, 1, 1]), ("val", [0, 3])):
        folder = find_split(others_tars, split)
        assert folder == others_tars / split
        manifest = read_manifest(folder)
        assert (manifest.split, manifest.classes) == (split, ("0000", "0001", "0002", "0003"))
        assert manifest.label.tolist() == labels
        assert manifest.crc32 is None
        assert {entry.sha256 for entry in manifest.shards} == {None}
    assert images_of(others_tars / "train") == [make_image(i) for i in range(5)]
    assert os.readlink(others_tars / "val/imagenet1k-validation-00.tar") == "../imagenet1k-validation-00.tar"
    verify.main([str(others_tars), "--workers", "1"])
    moved = others_tars.rename(others_tars.parent / "moved")  # the links are relative
    assert images_of(moved / "train") == [make_image(i) for i in range(5)]


def test_again_changes_nothing_until_checksums_are_asked_for(others_tars, capsys):
    def state() -> dict[str, tuple[int, bytes]]:
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in others_tars.rglob("*.*")}

    run(others_tars)
    before = state()
    capsys.readouterr()
    run(others_tars)
    assert capsys.readouterr().out.count("are indexed already") == 2
    assert state() == before
    run(others_tars, "--checksums")
    assert capsys.readouterr().out.count("indexed with checksums") == 2
    after = state()
    manifest = read_manifest(others_tars / "train")
    assert manifest.crc32 is not None
    assert manifest.crc32.tolist() == [zlib.crc32(image) for image in images_of(others_tars / "train")]
    for options in ([], ["--checksums"]):
        run(others_tars, *options)
        assert capsys.readouterr().out.count("are indexed already") == 2
        assert state() == after
    verify.main([str(others_tars), "--workers", "1"])


def test_a_manifest_of_other_tars_is_not_overwritten(others_tars, make_image):
    run(others_tars)
    before = (others_tars / "train/manifest.json").read_bytes()
    write_tar(others_tars / "imagenet1k-train-0002.tar", [1], make_image, 9)
    with pytest.raises(UserError, match=r"imagenet1k-train-0002\.tar is only in the folder"):
        run(others_tars)
    (others_tars / "imagenet1k-train-0002.tar").unlink()
    write_tar(others_tars / "imagenet1k-train-0001.tar", [1, 2], make_image, 3)
    with pytest.raises(UserError, match=r"got another label of sample 4.*if it is stale, delete it"):
        run(others_tars)
    names = others_tars.parent / "names"
    names.write_text("a\nb\nc\nd\n")
    write_tar(others_tars / "imagenet1k-train-0001.tar", [1, 1], make_image, 3)
    with pytest.raises(UserError, match="other names of classes"):
        run(others_tars, "--classes", names)
    run(others_tars)
    assert (others_tars / "train/manifest.json").read_bytes() == before


def test_the_names_of_tars_and_folders_tell_the_split(tmp_path, make_image):
    cases = [
        (["a.tar"], [], {"train": "."}),
        (["a.tar"], ["--split", "val"], {"val": "."}),
        (["x-val-0.tar"], [], {"val": "."}),
        (["x-test-0.tar"], ["--split", "val"], {"val": "."}),
        (["train/a.tar", "val/b.tar"], [], {"train": "train", "val": "val"}),
        (["train/a.tar", "val/b.tar"], ["--split", "val"], {"val": "val"}),
        (["train/a.tar", "validation/b.tar"], [], {"train": "train", "val": "val"}),
        (["x-train-0.tar", "x-valid-0.tar"], ["--split", "train"], {"train": "train"}),
        (["x-train-0.tar", "x-test-0.tar"], [], {"train": "train"}),
    ]
    for number, (names, options, expected) in enumerate(cases):
        folder = tmp_path / str(number)
        for name in names:
            write_tar(folder / name, [0, 1], make_image)
        run(folder, *options)
        found = {split: find_split(folder, split) for split in ("train", "val")}
        for split, where in found.items():
            is_there = where is not None and (where / "manifest.json").exists()
            assert is_there == (split in expected), (names, split)
            if is_there:
                assert where == folder / expected[split]
                assert read_manifest(where).split == split
    (tmp_path / "validation").mkdir()
    shutil.copyfile(tmp_path / "0/a.tar", tmp_path / "validation/a.tar")
    run(tmp_path / "validation")
    assert read_manifest(tmp_path / "validation").split == "val"


def test_classes_have_names_where_somebody_knows_them(tmp_path, make_image):
    def classes_of(name: str, *options: object, info: object = None, labels: list[int | str] | None = None) -> tuple:
        folder = tmp_path / name
        write_tar(folder / "a.tar", labels or [1, 0], make_image)
        if info is not None:
            (folder / "_info.json").write_text(json.dumps(info))
        run(folder, *options)
        assert read_manifest(folder).label.tolist() == [1, 0]
        return read_manifest(folder).classes

    file = tmp_path / "names.txt"
    file.write_text("n01 tench, Tinca\nn02 goldfish\n\n")
    assert classes_of("file", "--classes", file) == ("n01", "n02")
    assert classes_of("by-name", "--classes", file, labels=["n02", "n01"]) == ("n01", "n02")
    assert len(classes_of("timm", "--classes", "imagenet")) == 1000
    features = {"label": {"names": ["x", "y", "z"], "_type": "ClassLabel"}}
    assert classes_of("info", info={"default": {"features": features}}) == ("x", "y", "z")
    assert classes_of("no-names", info={"splits": {"train": {"filenames": ["a.tar"]}}}) == ("0000", "0001")
    with pytest.raises(UserError, match="label 1; expected: 0 to 0"):
        classes_of("few", info={"classes": ["x"]})
    (tmp_path / "few/_info.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the info file of the tars"):
        run(tmp_path / "few")


def test_samples_without_a_label_are_refused_or_skipped(tmp_path, make_image, capsys):
    write_tar(tmp_path / "a.tar", [0, "wolf", 1, -1], make_image)
    with pytest.raises(UserError, match=r"2 keys are no samples: got .*a\.tar: n0001: its label is neither"):
        run(tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in said] == ["n0001", "n0003"]
    assert not (tmp_path / "manifest.json").exists()
    run(tmp_path, "--skip-unusable")
    assert read_manifest(tmp_path).label.tolist() == [0, 1]
    assert images_of(tmp_path) == [make_image(0), make_image(2)]
    verify.main([str(tmp_path), "--workers", "1"])


def test_what_cannot_be_indexed_is_refused_with_the_hint(tmp_path, make_image):
    def refuse(words: str, *options: object) -> None:
        with pytest.raises(UserError, match=words):
            run(tmp_path / "x", *options)
        assert not list(tmp_path.rglob("manifest*"))

    refuse("the folder of tars is no folder")
    path = tmp_path / "x/a-train-0.tar"
    write_tar(path, [0, 1], make_image)
    refuse("no tars of split val here", "--split", "val")
    refuse("--workers is too small", "--workers", 0)
    write_tar(tmp_path / "x/b.tar", [0], make_image)
    refuse("the names of some tars have no split")
    (tmp_path / "x/b.tar").unlink()
    (tmp_path / "x/c.tar.gz").write_bytes(b"")
    refuse(r"a compressed tar cannot be read at an offset.*hint: gunzip it")
    (tmp_path / "x/c.tar.gz").rename(tmp_path / "x/c-train-1.tar")
    refuse(r"a tar cannot be indexed: got .*c-train-1\.tar: no tar")
    (tmp_path / "x/c-train-1.tar").write_bytes(b"\x1f\x8b\x08" + bytes(700))
    refuse("compressed with gzip.*hint: unpack it")
    content = path.read_bytes()
    (tmp_path / "x/c-train-1.tar").write_bytes(content[:2000])
    refuse(r"truncated.*hint: copy it again", "--skip-unusable")
    path.unlink()
    (tmp_path / "x/c-train-1.tar").unlink()
    refuse("no tars of split train or val here")


def test_links_do_not_replace_what_is_there(others_tars):
    (others_tars / "val").mkdir()
    (others_tars / "val/imagenet1k-validation-00.tar").write_bytes(b"something else")
    with pytest.raises(UserError, match="a tar is in the way of a link"):
        run(others_tars)
    assert (others_tars / "val/imagenet1k-validation-00.tar").read_bytes() == b"something else"


def test_parts_of_a_sharding_are_merged(tree, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(tree, source / "train")
    shutil.copytree(tree, source / "val")
    options = ["--shard-size", "5", "--workers", "1"]
    shard.main([str(source), str(tmp_path / "whole"), *options])
    out = tmp_path / "out"
    for part in range(2):
        shard.main([str(source), str(out), *options, "--part", f"{part}/2"])
        if part == 0:
            with pytest.raises(UserError, match="shards are not complete"):
                run(out)
    run(out)
    files = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    whole = tmp_path / "whole"
    assert files == {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    capsys.readouterr()
    run(out)
    assert capsys.readouterr().out.count("are indexed already") == 2
    assert files == {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    verify.main([str(out), "--workers", "1"])


def test_the_number_of_processes_changes_nothing(others_tars, make_image, monkeypatch):
    write_tar(others_tars / "imagenet1k-train-0002.tar", [3, 3], make_image, 7)
    run(others_tars)
    one = read_manifest(others_tars / "train")
    shutil.rmtree(others_tars / "train")
    monkeypatch.setattr(index, "POOL_SECONDS", 0.0)
    index.main([str(others_tars), "--workers", "2"])
    two = read_manifest(others_tars / "train")
    assert one.digest == two.digest
    assert np.array_equal(one.offset, two.offset)
