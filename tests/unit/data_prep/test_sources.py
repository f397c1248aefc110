"""Keys name files uniquely, formats are told by content, unclear sources are refused."""

import io
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image

from data_prep.sources import EXTENSIONS, encode_key, find_sources, image_extension
from gcvit.errors import UserError

# File names: no slash, no zero byte; hidden ones are left out by the scan.
names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: not name.startswith(".")
)
stems = st.builds("{}/{}".format, names, names)


@given(stems)
@example("__meta__/x")
@example("a b/1.2.3%41é\n")
def test_a_key_is_ascii_without_dots_and_can_be_undone(stem):
    key = encode_key(f"{stem}.jpg")
    assert re.fullmatch(r"[ -~]+/[ -~]+", key)
    assert "." not in key
    assert not key.startswith("__")
    assert unquote_to_bytes(key).decode() == stem


@given(stems, stems)
@example("a/x.y", "a/x%2Ey")
@example("a.b/c", "a/b.c")
def test_different_files_have_different_keys(one, other):
    assume(one != other)
    assert encode_key(f"{one}.jpg") != encode_key(f"{other}.png")


def test_keys_of_usual_names_are_their_paths():
    assert encode_key("n01440764/n01440764_10026.JPEG") == "n01440764/n01440764_10026"
    assert encode_key("v1.5/a.b.jpg") == "v1%2E5/a%2Eb"


@pytest.mark.parametrize("kind", sorted(set(EXTENSIONS) - {"MPO"}))
def test_the_extension_follows_the_content(make_image, kind):
    assert image_extension(make_image(0, kind)) == EXTENSIONS[kind]


def test_a_jpeg_with_a_second_picture_is_a_jpeg():
    buffer = io.BytesIO()
    first, second = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "red")
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    assert Image.open(buffer).format == "MPO"
    assert image_extension(buffer.getvalue()) == "jpg"


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff", b"\x1f\x8b\x08" + bytes(99), b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(ValueError, match=r"empty file|no known image|damaged"):
        image_extension(data)


def test_a_single_tree(tree):
    (tree / ".DS_Store").write_bytes(b"x")
    (tree / "a/.hidden").write_bytes(b"x")
    (tree / "classes.txt").write_text("a b c")
    (tree / "c/deep").mkdir()
    (tree / "c/0.jpg").rename(tree / "c/deep/0.jpg")
    [source] = find_sources(tree, None)
    assert (source.split, source.classes, source.labels) == (
        "train",
        ("a", "b", "c"),
        [0] * 5 + [1] * 4 + [2] * 3,
    )
    assert source.paths[-3:] == ["c/1.jpg", "c/2.jpg", "c/deep/0.jpg"]
    assert find_sources(tree, "val")[0].split == "val"


def test_two_splits_number_their_labels_by_train(tree, tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    tree.rename(both / "train")
    assert [source.split for source in find_sources(both, None)] == ["train"]
    (both / "val/c").mkdir(parents=True)
    (both / "val/c/0.jpg").write_bytes(b"x")
    train, val = find_sources(both, None)
    assert val.classes == train.classes == ("a", "b", "c")
    assert (val.labels, val.paths) == ([2], ["c/0.jpg"])
    with pytest.raises(UserError, match="--split has no effect"):
        find_sources(both, "val")
    (both / "val/d").mkdir()
    with pytest.raises(UserError, match=r"val has 1 class folders that train lacks.*val/d"):
        find_sources(both, None)


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "missing.*cure"),
        (["notes.txt"], "no class folders"),
        (["train.tar.gz"], "archive.*train.tar.gz.*unpack"),
        (["a/0.jpg", "stray.JPG"], "outside a class folder.*stray.JPG"),
        (["a/0.jpg", "b/.hidden"], "class folder holds no images.*/b;"),
        (["a/x.jpg", "a/x.png"], r"one key, a/x: got .*a/x.jpg and .*a/x.png"),
        (["a/x", "a/x-1.jpg", "a/x.jpg"], "one key, a/x:"),
        (["val/a/0.jpg"], "no train folder.*--split val"),
    ],
)
def test_unclear_sources_are_refused(tmp_path, files, message):
    for file in files:
        write(tmp_path / "source" / file)
    with pytest.raises(UserError, match=message):
        find_sources(tmp_path / "source", None)


def test_a_compressed_source_is_refused(tmp_path):
    write(tmp_path / "images.tar.gz")
    with pytest.raises(UserError, match=r"no directory.*images\.tar\.gz \(a file\).*unpack"):
        find_sources(tmp_path / "images.tar.gz", None)
