"""index_tar finds the samples of timm's and open_clip's tars, and names each that is none."""

import hashlib
import io
import json
import tarfile
import zlib
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from data_prep.shards.samples import Result, Task, index_tar, read_label, split_name


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def index(path: Path, checksums: bool = False, **label_of: int) -> Result:
    return index_tar(Task(path, label_of, checksums))


def test_members_of_a_sample_come_in_any_order(tmp_path):
    path = tmp_path / "x.tar"
    images = {f"b/{i}": bytes([i]) * (300 * i + 1) for i in range(4)}
    write_tar(
        path,
        [
            ("README", b"no sample"),
            ("b/0.cls", b"5"),
            ("b/0.jpg", images["b/0"]),
            ("b/1.JPEG", images["b/1"]),
            ("b/1.json", json.dumps({"caption": "x" * 9000, "label": 7}).encode()),
            ("b/2.json", b'{"cls": "dog"}'),
            ("b/2.txt", b"a dog"),
            ("b/2.png", images["b/2"]),
            ("b/3.webp", images["b/3"]),
            ("b/3.json", b"not read where there is a .cls"),
            ("b/3.seg.png", b"a mask is no image of the sample"),
            ("b/3.cls", b"2\n"),
        ],
    )
    result = index(path, dog=3)
    assert (result.refused, result.problems) == (None, [])
    assert result.shard.num_bytes == path.stat().st_size
    assert result.shard.sha256 is None
    assert result.columns["label"].tolist() == [5, 7, 3, 2]
    assert set(result.columns) == {"offset", "length", "label"}
    content = path.read_bytes()
    places = zip(result.columns["offset"], result.columns["length"], strict=True)
    assert [content[offset : offset + length] for offset, length in places] == list(images.values())


def test_checksums_are_those_of_all_bytes(tmp_path):
    path = tmp_path / "x.tar"
    images = [b"a" * (3 << 20), b"b" * 700, b"c"]
    members = [[(f"{i}.cls", b"0"), (f"{i}.jpg", data)] for i, data in enumerate(images)]
    write_tar(path, [member for pair in members for member in pair])
    result = index(path, checksums=True)
    assert result.shard.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert result.columns["crc32"].tolist() == [zlib.crc32(data) for data in images]


def test_each_key_that_is_no_sample_is_named(tmp_path):
    path = tmp_path / "x.tar"
    good = [("good.jpg", b"x"), ("good.cls", b"1")]
    cases = {
        "no label": [("bad.jpg", b"x")],
        "no image": [("bad.cls", b"1"), ("bad.json", b"{}")],
        "two images": [("bad.jpg", b"x"), ("bad.png", b"x"), ("bad.cls", b"1")],
        "two .cls": [("bad.jpg", b"x"), ("bad.cls", b"1"), ("bad.cls", b"2")],
        "its image has 0 bytes": [("bad.jpg", b""), ("bad.cls", b"1")],
        "its label is -1": [("bad.jpg", b"x"), ("bad.cls", b"-1")],
        "its .json cannot be read": [("bad.jpg", b"x"), ("bad.json", b"{" * (2 << 20))],
    }
    for words, members in cases.items():
        write_tar(path, [*members, *good])
        result = index(path)
        [problem] = result.problems
        assert problem.startswith("bad: ")
        assert words in problem
        assert (result.shard.num_samples, result.columns["label"].tolist()) == (1, [1])


def test_tars_that_cannot_be_indexed_are_refused(tmp_path):
    path = tmp_path / "x.tar"
    assert index(path).refused == "No such file or directory"
    write_tar(path, [("a.txt", b"x")])
    assert "no samples; no images or labels" in str(index(path).refused)
    write_tar(path, [("a.jpg", b"x")])
    assert "no samples; a: no label" in str(index(path).refused)
    path.write_bytes(b"\x1f\x8b" + bytes(600))
    assert "compressed with gzip" in str(index(path).refused)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [(f"{i}.{name}", b"1" * 600) for i in range(3) for name in ("jpg", "cls")])
    content = path.read_bytes()
    for size in range(0, 6 * 3 * 512 + 512, 512):
        path.write_bytes(content[:size])
        assert index(path, checksums=size % 1024 == 0).refused


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9 * 1024 - 1), st.integers(1, 255)), min_size=1, max_size=3), st.booleans())
def test_flipped_bytes_never_crash(tmp_path_factory, flips, checksums):
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    write_tar(path, [(f"{'k' * 120}{i}.{name}", b'{"label": 1}') for i in range(2) for name in ("jpg", "json")])
    content = bytearray(path.read_bytes())
    for place, bits in flips:
        content[place] ^= bits
    path.write_bytes(content)
    result = index(path, checksums)
    assert result.refused or len(result.columns["label"]) == result.shard.num_samples <= 2


@given(st.text(st.sampled_from("aB.é/_ \n"), max_size=12))
@example("v1.5/a.seg.png")
@example("a/.hidden")
@example("./a.cls")
@example("/x/y.z/a.b.c")
@example("a/b.JPEG")
def test_keys_and_extensions_are_those_of_webdataset(name):
    key, extension = base_plus_ext(name)
    assert split_name(name) == ((name, "") if key is None else (key, extension.lower()))


def test_labels_are_numbers_or_names():
    label_of = {"cat": 0, "dog": 1, "3": 2}
    assert read_label(b"5", None, {}) == 5
    assert read_label(b" 5\n", b"{", {}) == 5  # a .cls comes before the .json
    assert read_label(b"dog", None, label_of) == 1
    assert read_label(b"3", None, label_of) == 3  # a number, whatever classes are called
    assert read_label(None, b'{"label": 3, "class": 4}', {}) == 3
    assert read_label(None, b'{"cls": 3}', {}) == 3
    assert read_label(None, b'{"class": "dog"}', label_of) == 1
    for cls, about, words in [
        (None, None, "no label"),
        (b"", None, "neither a number"),
        (b"-1", None, "label is -1"),
        (b"4294967296", None, "label is 4294967296"),
        (b"9" * 5000, None, "neither a number"),
        (b"wolf", None, "'wolf'"),
        ("²".encode(), None, "neither a number"),
        (None, b"{", "cannot be read"),
        (None, b"[" * 100000, "cannot be read"),
        (None, b"[3]", "no fields"),
        (None, b'{"caption": "x"}', "no field"),
        (None, b'{"label": true}', "neither a number"),
        (None, b'{"label": 1.5}', "neither a number"),
    ]:
        with pytest.raises(ValueError, match=words):
            read_label(cls, about, label_of)
