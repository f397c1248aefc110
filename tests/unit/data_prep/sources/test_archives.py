"""Samples in tars lie where tarfile finds them, and give the shards that the unpacked tree gives."""

import contextlib
import gzip
import importlib
import io
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.io import savemat

from data_prep import shard
from data_prep.shards.byte_range import read_place
from data_prep.sources.archives import list_files, read_kit
from data_prep.sources.discover import KIT, TRAIN_TAR, VAL_TAR, Source, find_sources
from gcvit.errors import UserError

# The kit's own numbers of the classes, in another order than their names; the last synset is no class but above them.
SYNSETS = [("n02000002", 0), ("n03000003", 0), ("n01000001", 0), ("n00000009", 3)]
TRUTH = [3, 1, 1, 2, 3]  # of the validation images 1 to 5


def pack(path: Path, members: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.read_bytes()


def pack_kit(path: Path, synsets: list[tuple[str, int]], truth: list[int]) -> None:
    rows = [(number, wnid, children) for number, (wnid, children) in enumerate(synsets, 1)]
    record = np.array(rows, [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("num_children", "f8")])
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": record[:, None]})
    lines = "".join(f"{number}\n" for number in truth).encode()
    folder = "ILSVRC2012_devkit_t12/data/"
    files = {"ILSVRC2012_validation_ground_truth.txt": lines, "meta.mat": buffer.getvalue()}
    path.write_bytes(gzip.compress(pack(path, {folder + name: data for name, data in files.items()})))


@pytest.fixture
def tree(tmp_path: Path, make_image: Callable[..., bytes]) -> Path:
    """The unpacked set: train/ with 4, 3, 2 images of the classes, val/ with the five."""
    root = tmp_path / "tree"
    wnids = sorted(wnid for wnid, children in SYNSETS if not children)
    for label, wnid in enumerate(wnids):
        (root / "train" / wnid).mkdir(parents=True)
        (root / "val" / wnid).mkdir(parents=True)
        for i in range(4 - label):
            (root / f"train/{wnid}/{wnid}_{10 - i}.JPEG").write_bytes(make_image(10 * label + i))
    for number, truth in enumerate(TRUTH, 1):
        path = root / f"val/{SYNSETS[truth - 1][0]}/ILSVRC2012_val_{number:08d}.JPEG"
        path.write_bytes(make_image(100 + number, "PNG" if number == 2 else "JPEG"))
    return root


def class_members(tree: Path) -> dict[str, bytes]:
    """Each class of train/ as a tar, as ILSVRC has them."""
    packed = {}
    for folder in (tree / "train").iterdir():
        # Not in the order of names.
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir(), reverse=True)}
        packed[f"{folder.name}.tar"] = pack(tree.parent / "class.tar", files)
    return packed


@pytest.fixture
def ilsvrc(tree: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "ilsvrc"
    folder.mkdir()
    pack(folder / TRAIN_TAR, class_members(tree))
    pack(folder / VAL_TAR, {path.name: path.read_bytes() for path in sorted(tree.glob("val/*/*"), reverse=True)})
    pack_kit(folder / KIT, SYNSETS, TRUTH)
    return folder


def contents(source: Source) -> list[tuple[str, int, bytes]]:
    rows = zip(source.paths, source.labels, strict=True)
    return [(path, label, read_place(source.root, source.place(i))) for i, (path, label) in enumerate(rows)]


def assert_alike(sources: list[Source], others: list[Source]) -> None:
    for source, other in zip(sources, others, strict=True):
        assert (source.split, source.classes) == (other.split, other.classes)
        assert contents(source) == contents(other)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_ilsvrc_and_its_unpacked_tree_give_the_same_shards(ilsvrc, tree, tmp_path):
    assert_alike(find_sources(ilsvrc, None), find_sources(tree, None))
    for source, out in ((ilsvrc, tmp_path / "a"), (tree, tmp_path / "b")):
        shard.main([str(source), str(out), "--shard-size", "3", "--workers", "1"])
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert {"train/train-000002.tar", "val/val-000001.tar", "val/manifest.json"} <= snapshot(tmp_path / "a").keys()


def test_one_of_ilsvrcs_tars_is_a_source_of_its_own(ilsvrc, tree):
    train, val = find_sources(tree, None)
    assert_alike(find_sources(ilsvrc / TRAIN_TAR, None), [train])
    assert_alike(find_sources(ilsvrc / VAL_TAR, None), [val])
    assert not find_sources(ilsvrc / TRAIN_TAR, "train")[0].split_folder
    assert find_sources(ilsvrc / TRAIN_TAR, "val")[0].split == "val"
    with pytest.raises(UserError, match=rf"--split has no effect.*name one of them: .*{TRAIN_TAR}"):
        find_sources(ilsvrc, "train")
    (ilsvrc / TRAIN_TAR).unlink()
    assert_alike(find_sources(ilsvrc, None), [val])


def test_ilsvrcs_tars_among_what_was_unpacked_of_them_are_refused(ilsvrc, tree):
    (ilsvrc / "ILSVRC2012_devkit_t12").mkdir()
    assert len(find_sources(ilsvrc, None)) == 2
    shutil.copytree(tree / "train", ilsvrc, dirs_exist_ok=True)
    with pytest.raises(UserError, match="archive in place of a class folder"):
        find_sources(ilsvrc, None)
    (ilsvrc / "train").mkdir()
    for folder in ilsvrc.glob("n*"):
        folder.rename(ilsvrc / "train" / folder.name)
    assert_alike(find_sources(ilsvrc, None), find_sources(tree, None)[:1])


def test_class_tars_are_a_source(tree, tmp_path):
    folder = tmp_path / "classes"
    folder.mkdir()
    for name, data in class_members(tree).items():
        (folder / name).write_bytes(data)
    (folder / "words.txt").write_text("n01000001 first")
    assert_alike(find_sources(folder, None), find_sources(tree / "train", None))
    class_map = tmp_path / "map.txt"
    class_map.write_text("n03000003 third\nn04000004 fourth\nn02000002 second\nn01000001 first")
    assert_alike(find_sources(folder, None, classes=class_map), find_sources(tree / "train", None, classes=class_map))
    assert_alike(find_sources(folder, None, val_fraction=0.5), find_sources(tree / "train", None, val_fraction=0.5))
    (folder / "n05000005.tar.gz").write_bytes(gzip.compress((folder / "n01000001.tar").read_bytes()))
    with pytest.raises(UserError, match=r"an archive in place.*n05000005\.tar\.gz.*unpack"):
        find_sources(folder, None)


def test_folders_and_hidden_files_in_class_tars(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("./a/2.jpg", "a/1.jpg", "./3.jpg", "a/._1.jpg", ".DS_Store"):
            tar.addfile(tarfile.TarInfo(name))
    [source] = find_sources(tmp_path, None)
    assert source.paths == ["a/1.jpg", "a/2.jpg", "a/3.jpg"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../x.jpg", r"lie in folders: got .*a\.tar: '\.\./x\.jpg'"),
        ("..", "lie in folders"),
        ("/etc/passwd", "lie in folders"),
        ("deep/x.jpg", "lie in folders.*unpack"),
        ("b.tar", "an archive in a class tar.*b.tar"),
        ("x.png", "one key, a/x:"),
        (".hidden.jpg", None),
    ],
)
def test_names_in_class_tars_that_name_no_image_are_refused(tmp_path, name, message):
    pack(tmp_path / "a.tar", {"x.jpg": b"x", name: b"y"})
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        find_sources(tmp_path, None)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, "'evil', a symbolic link"),
        (tarfile.LNKTYPE, "'evil', a hard link"),
        (tarfile.CHRTYPE, "'evil', a device"),
        (tarfile.FIFOTYPE, "'evil', a pipe"),
        (tarfile.GNUTYPE_SPARSE, "'evil', a sparse file"),
    ],
)
def test_members_that_are_no_files_are_refused(tmp_path, kind, message):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("x.jpg"))
        evil = tarfile.TarInfo("evil")
        evil.type, evil.linkname = kind, "/etc/passwd"
        tar.addfile(evil)
    with pytest.raises(UserError, match=f"no plain file.*{message}"):
        find_sources(tmp_path, None)


def test_sparse_files_in_pax_headers_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("x.jpg")
        info.pax_headers = {"GNU.sparse.major": "1"}
        tar.addfile(info)
    with pytest.raises(UserError, match=r"no plain file.*a sparse file"):
        find_sources(tmp_path, None)


@pytest.mark.parametrize("compress", ["gzip", "bz2", "lzma"])
def test_compressed_class_tars_are_refused_with_the_hint(tmp_path, compress):
    data = pack(tmp_path / "a.tar", {"x.jpg": b"x"})
    (tmp_path / "a.tar").write_bytes(importlib.import_module(compress).compress(data))
    with pytest.raises(UserError, match=r"a\.tar \(compressed with.*unpack it to a plain tar: (gzip|bzip2|xz) -d"):
        find_sources(tmp_path, None)
    pack(tmp_path / "whole.tar", {"a.tar": (tmp_path / "a.tar").read_bytes()})
    with pytest.raises(UserError, match=r"whole\.tar: a\.tar \(compressed with"):
        find_sources(tmp_path / "whole.tar", None)


def test_truncated_and_corrupt_tars_are_refused_wherever_it_is(tmp_path):
    valid = pack(tmp_path / "a.tar", {"1.jpg": b"1" * 700, "2" * 120 + ".jpg": b"2" * 600})
    end = valid.rindex(b"2" * 600) + 600
    for length in (*range(1, end, 100), 1536, -(-end // 512) * 512):
        (tmp_path / "a.tar").write_bytes(valid[:length])
        with pytest.raises(UserError, match="truncated"):
            find_sources(tmp_path, None)
    (tmp_path / "a.tar").write_bytes(valid + valid)
    with pytest.raises(UserError, match="two tars in one file"):
        find_sources(tmp_path, None)
    for place in (0, 100, 124, 150, 156, 300, 1536, 1660):  # in headers
        data = bytearray(valid)
        data[place] ^= 0x41
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(UserError, match=r"no tar, or a corrupt one|a corrupt header"):
            find_sources(tmp_path, None)
    pack(tmp_path / "a.tar", {})
    with pytest.raises(UserError, match="holds no images"):
        find_sources(tmp_path, None)


def test_an_inner_tar_is_not_read_beyond_its_end(tmp_path):
    """The header behind a class tar that was cut off belongs to the outer tar."""
    valid = pack(tmp_path / "a.tar", {"1.jpg": b"1", "2.jpg": b"2" * 600})
    for length in (512, 1024, 1024 + 512, 1024 + 1024):
        pack(tmp_path / "whole.tar", {"a.tar": valid[:length], "b.tar": valid})
        with pytest.raises(UserError, match=r"whole\.tar: a\.tar \(.*truncated"):
            find_sources(tmp_path / "whole.tar", None)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.tar": b"", "notes.txt": b""}, "a member that is no class tar: got .*notes.txt"),
        ({"a.tar": b"", "x/a.tar": b""}, "two tars of one class: got .*x/a.tar"),
        ({"x.jpg": b""}, "neither class tars nor.*x.jpg"),
        ({}, "neither class tars nor"),
    ],
)
def test_tars_of_other_kinds_are_refused(tmp_path, members, message):
    pack(tmp_path / "whole.tar", members)
    with pytest.raises(UserError, match=message):
        find_sources(tmp_path / "whole.tar", None)


@pytest.mark.parametrize(
    ("truth", "synsets", "message"),
    [
        (TRUTH[:4], SYNSETS, "without a label.*val_00000005.*00000001.JPEG to 00000004"),
        ([*TRUTH, 1], SYNSETS, "differ in number: got 5 images .* 6 labels"),
        ([9, *TRUTH[1:]], SYNSETS, "kit cannot be read.*9"),
        ([4, *TRUTH[1:]], SYNSETS, "kit cannot be read.*4"),
        (TRUTH, [("../../x", 0), *SYNSETS[1:]], "names no WordNet id.*../../x"),
        (TRUTH, [("n02000004", 0), *SYNSETS[1:]], "val has 1 classes that train lacks.*n02000004"),
    ],
)
def test_kits_that_do_not_fit_are_refused(ilsvrc, truth, synsets, message):
    pack_kit(ilsvrc / KIT, synsets, truth)
    with pytest.raises(UserError, match=message):
        find_sources(ilsvrc, None)


def test_a_missing_or_corrupt_kit_is_refused(ilsvrc):
    data = (ilsvrc / KIT).read_bytes()
    for corrupt in (data[: len(data) // 2], data[:60], b"", b"no tar", gzip.compress(b"no tar")):
        (ilsvrc / KIT).write_bytes(corrupt)
        with pytest.raises(UserError, match=r"kit cannot be read: got .*devkit.*fetch it again"):
            read_kit(ilsvrc / KIT)
    (ilsvrc / KIT).unlink()
    with pytest.raises(UserError, match=r"labels of the validation images are missing.*beside the images"):
        find_sources(ilsvrc, None)


def test_without_scipy_the_hint_names_it(ilsvrc, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match=r"needs SciPy, which is missing; hint: pip install scipy"):
        find_sources(ilsvrc, None)


names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40)
files = st.dictionaries(st.lists(names, min_size=1, max_size=6).map("/".join), st.binary(max_size=1100), max_size=5)


@given(files, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
@example({"a" * 300: b"x" * 513, "é" * 60 + "/" + "b" * 99: b"", "c": b"y" * 512}, tarfile.GNU_FORMAT)
@example({"a" * 90 + "/" + "b" * 90: b"x"}, tarfile.USTAR_FORMAT)
def test_members_of_a_tar_in_a_tar_lie_where_tarfile_finds_them(tmp_path_factory, members, format):
    folder = tmp_path_factory.getbasetemp() / "nested"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        inner = pack(folder / "inner.tar", members, format)
    except ValueError:
        return  # a name that ustar cannot hold
    pack(folder / "outer.tar", {"first": b"x" * 100, "inner.tar": inner, "last": inner})

    def find() -> Iterator[tuple[str, int, bytes]]:
        _, nested, _ = list_files(folder / "outer.tar")
        data = (folder / "outer.tar").read_bytes()
        for name, begin, size in list_files(folder / "outer.tar", nested):
            yield name, begin - nested[1], data[begin : begin + size]

    with tarfile.open(folder / "inner.tar") as tar:
        expected = [(info.name, info.offset_data, tar.extractfile(info).read()) for info in tar]
    assert list(find()) == expected
