"""Keys name files uniquely, labels follow the classes, ambiguous sources are refused, val is chosen by hash."""

import os
import re
import signal
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from data_prep.shards.byte_range import Place, read_place
from data_prep.shards.tar_writer import encode_key
from data_prep.sources.discover import Source, find_sources, spooled
from data_prep.sources.val_split import choose_val
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


def split_tree(tree: Path) -> Path:
    """The tree's classes a, b, c as train/, and as val/ one image of c."""
    both = tree.parent / "both"
    both.mkdir()
    tree.rename(both / "train")
    write(both / "val/c/0.jpg")
    return both


def test_two_splits_number_their_labels_by_train(tree):
    both = split_tree(tree)
    train, val = find_sources(both, None)
    assert (train.split_folder, val.split_folder) == (True, True)
    assert val.classes == train.classes == ("a", "b", "c")
    assert (val.labels, val.paths) == ([2], ["c/0.jpg"])
    with pytest.raises(UserError, match=r"--split has no effect.*both/train"):
        find_sources(both, "val")
    write(both / "val/d/0.jpg")
    with pytest.raises(UserError, match=r"val has 1 classes that train lacks.*val: d"):
        find_sources(both, None)


def test_train_alone_in_a_folder_is_a_split(tree, tmp_path):
    (tmp_path / "source").mkdir()
    tree.rename(tmp_path / "source/train")
    [source] = find_sources(tmp_path / "source", None)
    assert (source.split, source.split_folder, source.root) == ("train", True, tmp_path / "source/train")


def write(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "missing.*hint"),
        (["notes.txt"], "no class folders"),
        (["train.tar.gz"], "archive.*train.tar.gz.*unpack"),
        (["a/0.jpg", "b.tar"], "archive in place of a class folder.*b.tar"),
        (["a/0.jpg", "stray.JPG"], "outside a class folder.*stray.JPG"),
        (["a/0.jpg", "b/.hidden"], "class folder holds no images.*/b;"),
        (["a/x.jpg", "a/x.png"], r"one key, a/x: got .*a/x.jpg and a/x.png"),
        (["a/x", "a/x-1.jpg", "a/x.jpg"], "one key, a/x:"),
        (["val/a/0.jpg"], "no train folder.*--split val"),
    ],
)
def test_unclear_sources_are_refused(tmp_path, files, message):
    for file in files:
        write(tmp_path / "source" / file)
    with pytest.raises(UserError, match=message):
        find_sources(tmp_path / "source", None)


def test_a_file_that_is_no_tar_is_refused(tmp_path):
    write(tmp_path / "images.tar.gz")
    with pytest.raises(UserError, match=r"no directory and no tar.*images\.tar\.gz \(a file\).*unpack"):
        find_sources(tmp_path / "images.tar.gz", None)
    write(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="check the path"):
        find_sources(tmp_path / "notes.txt", None)


def test_a_place_is_read_whole_or_refused(tree, tmp_path):
    [source] = find_sources(tree, None)
    assert source.place(3) == Place("a/3.jpg", 0, None)
    data = (tree / "a/3.jpg").read_bytes()
    assert read_place(tree, source.place(3)) == data
    assert read_place(tree, Place("a/3.jpg", 7, 10)) == data[7:17]
    assert read_place(tree / "a/3.jpg", Place("", 7, 10)) == data[7:17]
    with pytest.raises(ValueError, match="ends 1 bytes before the sample at 7 does"):
        read_place(tree, Place("a/3.jpg", 7, len(data) - 6))
    with pytest.raises(OSError, match="No such file"):
        read_place(tree, Place("a/9.jpg"))
    with spooled(source, np.arange(3), tmp_path) as readable:
        assert readable is source


def test_a_pipe_that_is_called_an_image_is_refused_at_once(tree):
    def give_up(*_):
        raise AssertionError("waits for a writer")

    os.mkfifo(tree / "a/9.jpg")
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(5)
    try:
        for place in (Place("a/9.jpg"), Place("a/9.jpg", 7, 10), Place("a")):
            with pytest.raises(ValueError, match="no regular file"):
                read_place(tree, place)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_class_map_numbers_the_labels(tree, tmp_path):
    text = "c\tthe third\n\nnone of these\na first, and more\nb\n"
    [source] = find_sources(tree, None, classes=write(tmp_path / "map.txt", text.encode()))
    assert source.classes == ("c", "none", "a", "b")
    assert source.labels == [2] * 5 + [3] * 4 + [0] * 3
    assert source.paths[0] == "a/0.jpg"  # the order of samples stays
    train, val = find_sources(split_tree(tree), None, classes=tmp_path / "map.txt")
    assert (train.labels, val.labels) == (source.labels, [0])
    assert train.classes == val.classes == source.classes


def test_a_class_map_makes_train_dispensable(tmp_path):
    write(tmp_path / "source/val/b/0.jpg")
    [val] = find_sources(tmp_path / "source", None, classes=write(tmp_path / "map.txt", b"a\nb"))
    assert (val.split, val.labels) == ("val", [1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\n", "train has 1 classes that the class map lacks: got .*tree: c; expected: the 2 classes"),
        ("a\nb\nc\na 2\n", "names a class twice: got a on lines 1 and 4"),
        (" \n", "class map is empty"),
        ("a\nb/c\n", "no class folder can be called this: got 'b/c'"),
        ("\ta\n", "no class folder can be called this: got ''"),
    ],
)
def test_class_maps_that_do_not_fit_are_refused(tree, tmp_path, text, message):
    path = write(tmp_path / "map.txt", text.encode())
    with pytest.raises(UserError, match=message):
        find_sources(tree, None, classes=path)


def test_class_maps_may_be_lists_of_timm(tmp_path):
    write(tmp_path / "source/n01443537/x.JPEG")
    [source] = find_sources(tmp_path / "source", None, classes=Path("imagenet"))
    assert len(source.classes) == 1000
    assert source.classes == tuple(sorted(source.classes))
    assert source.labels == [1]
    with pytest.raises(
        UserError, match=r"no such class map: got --classes imagenot; .*timm's: .*imagenet, .*imagenet22k"
    ):
        find_sources(tmp_path / "source", None, classes=Path("imagenot"))
    with pytest.raises(UserError, match="cannot read the class map"):
        find_sources(tmp_path / "source", None, classes=tmp_path / "imagenet")


def by_split(sources: list[Source]) -> dict[str, list[str]]:
    return {source.split: source.paths for source in sources}


def test_a_val_split_is_taken_out_of_a_tree(tree):
    [whole] = find_sources(tree, None)
    train, val = find_sources(tree, None, val_fraction=0.4, seed=1)
    assert [train.split, val.split] == ["train", "val"]
    assert train.split_folder
    assert train.root == val.root == tree
    assert train.classes == val.classes == whole.classes
    assert sorted(train.paths + val.paths) == sorted(whole.paths)
    label_of = dict(zip(whole.paths, whole.labels, strict=True))
    for source in (train, val):
        assert source.labels == [label_of[path] for path in source.paths]
        assert source.paths == [path for path in whole.paths if path in set(source.paths)]
    assert by_split(find_sources(tree, None, val_fraction=0.4, seed=1)) == by_split([train, val])
    assert by_split(find_sources(tree, None, val_fraction=0.4, seed=2)) != by_split([train, val])


def test_a_val_fraction_without_sense_is_refused(tree):
    for fraction in (0, 1, -0.1, float("nan")):
        with pytest.raises(UserError, match="--val-fraction is out of range"):
            find_sources(tree, None, val_fraction=fraction)
    with pytest.raises(UserError, match="leaves val without samples: got 1e-09 of 12 samples"):
        find_sources(tree, None, val_fraction=1e-9)
    with pytest.raises(UserError, match="--split has no effect: --val-fraction makes train and val"):
        find_sources(tree, "train", val_fraction=0.5)
    with pytest.raises(UserError, match="there is a val already"):
        find_sources(split_tree(tree), None, val_fraction=0.5)


samples = st.sets(st.builds("{}/{}.jpg".format, st.sampled_from("abc"), st.integers(0, 60)), min_size=1)


@given(samples, samples, st.floats(0.3, 0.7), st.integers(0, 9))
def test_samples_that_are_added_move_no_others(old, new, fraction, seed):
    def choose(paths: set[str]) -> dict[str, bool]:
        ordered = sorted(paths)
        try:
            return dict(zip(ordered, choose_val(ordered, fraction, seed).tolist(), strict=True))
        except UserError:
            return dict.fromkeys(ordered, False)  # none would be in val

    before, after = choose(old), choose(old | new)
    for name in {path[0] for path in old}:
        in_class = [path for path in old if path[0] == name]
        moved = [path for path in in_class if before[path] != after[path]]
        # Only the one that was kept back from a class that was all in val may move.
        assert len(moved) <= (sum(not before[path] for path in in_class) == 1)
        assert all(after[path] for path in moved)
        assert not all(after[path] for path in old | new if path[0] == name)


def test_the_val_fraction_is_kept_in_each_class():
    paths = [f"{name}/{number}.jpg" for name in ("a", "b", "c") for number in range(5000)]
    for seed in range(3):
        in_val = choose_val(paths, 0.1, seed).reshape(3, 5000).sum(axis=1)
        assert (abs(in_val - 500) < 5 * 450**0.5).all()  # five standard deviations
