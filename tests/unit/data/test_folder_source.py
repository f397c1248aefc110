"""Trees of class folders: what counts as a sample, in which order and with which label, as in sharding."""

import os
import pickle
from pathlib import Path

import pytest

from data_prep.sources.discover import find_sources
from gcvit.data.folder_source import open_folder
from gcvit.errors import UserError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Names that a walk meets in another order than the sorted one; each file's content is its own path."""
    for path in ("b/10.JPG", "b/9.png", "a b/x.jpeg", "a b/deep/1.webp", "a b/deep.tiff", "ä/z.gif", "ä/Z.bmp"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    return tmp_path


def test_samples_are_sorted_by_class_and_path_as_in_shards(tree):
    source = open_folder(tree)
    names = [source.name(index) for index in range(source.num_samples)]
    assert names == ["a b/deep.tiff", "a b/deep/1.webp", "a b/x.jpeg", "b/10.JPG", "b/9.png", "ä/Z.bmp", "ä/z.gif"]
    assert source.classes == ("a b", "b", "ä")
    assert source.label.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert source.first.tolist() == [0, 3, 5, 7]
    assert source.length.tolist() == [len(name.encode()) for name in names]
    [sharded] = find_sources(tree, None)
    assert (sharded.classes, sharded.paths, sharded.labels) == (source.classes, names, source.label.tolist())


def test_fetching_reads_the_files(tree):
    source = pickle.loads(pickle.dumps(open_folder(tree)))  # noqa: S301
    assert [bytes(content).decode() for content in source.fetch(2, 5)] == ["a b/x.jpeg", "b/10.JPG", "b/9.png"]
    (tree / "b/9.png").unlink()
    with pytest.raises(UserError, match=r"cannot read a sample: got .*b/9\.png \(No such file"):
        source.fetch(4, 5)


def test_hidden_files_and_other_files_are_no_samples(tree):
    digest = open_folder(tree).digest
    for path in (".git/x.jpg", ".x.jpg", "readme.jpg", "b/.x.jpg", "b/.thumbs/x.jpg", "b/notes.txt", "b/jpg"):
        (tree / path).parent.mkdir(exist_ok=True)
        (tree / path).write_text("no sample")
    assert open_folder(tree).digest == digest
    (tree / "b/new.jpg").write_text("a sample")
    assert open_folder(tree).digest != digest


def test_names_that_are_no_utf8_and_links_are_read(tree):
    path = os.fsencode(tree / "b") + b"/\xff.jpg"
    with open(path, "wb") as file:
        file.write(b"odd")
    (tree / "linked").symlink_to(tree / "b", target_is_directory=True)
    source = open_folder(tree)
    assert source.classes == ("a b", "b", "linked", "ä")
    by_name = {source.name(index): bytes(source.fetch(index, index + 1)[0]) for index in range(source.num_samples)}
    assert by_name["b/\udcff.jpg"] == by_name["linked/\udcff.jpg"] == b"odd"


def test_given_classes_number_the_labels(tree):
    source = open_folder(tree, ("ä", "none", "b", "a b"))
    assert source.label.tolist() == [3, 3, 3, 2, 2, 0, 0]
    with pytest.raises(UserError, match=r"2 class folders that train lacks: got a b, ä"):
        open_folder(tree, ("b",))
