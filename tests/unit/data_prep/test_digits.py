"""The demo's data: the split that stands in the repo, and a reproducible tree that overwrites nothing."""

import io
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep import digits
from gcvit.errors import UserError


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return digits.make_tree()


def listed_val() -> list[int]:
    return json.loads(digits.SPLIT_FILE.read_text())["val"]


def test_list_is_what_the_seeded_draw_yields():
    _, labels = digits.load_scans()
    assert listed_val() == digits.draw_val(labels)
    assert listed_val() != digits.draw_val(labels, seed=digits.SEED + 1)


def test_split_is_disjoint_complete_and_stratified(files):
    names = {split: [n for n in files if n.startswith(split)] for split in ("train", "val")}
    assert len(names["train"]) == 1437
    assert len(names["val"]) == 360
    assert sorted(name[-8:-4] for name in files) == [f"{index:04d}" for index in range(1797)]
    assert {int(name[-8:-4]) for name in names["val"]} == set(listed_val())
    totals = Counter(name.split("/")[1] for name in files)
    held_out = Counter(name.split("/")[1] for name in names["val"])
    assert totals.keys() == set("0123456789")
    for label, total in totals.items():
        assert abs(held_out[label] - total * 360 / 1797) < 1


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data(), st.integers(0, 9))
def test_any_draw_is_stratified_and_of_the_size_asked(labels, data, seed):
    num_val = data.draw(st.integers(0, len(labels)))
    drawn = digits.draw_val(np.array(labels), num_val, seed)
    assert len(drawn) == len(set(drawn)) == num_val
    held_out = Counter(labels[index] for index in drawn)
    for label, total in Counter(labels).items():
        assert abs(held_out[label] - total * num_val / len(labels)) < 1


def test_images_show_the_scans(files):
    scans, labels = digits.load_scans()
    for name in list(files)[::100]:
        index = int(name[-8:-4])
        image = Image.open(io.BytesIO(files[name]))
        assert (image.format, image.mode, image.size) == ("JPEG", "L", (64, 64))
        assert name.split("/")[1] == str(labels[index])
        back = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float) * 16 / 255
        assert np.abs(scans - back).mean(axis=(1, 2)).argmin() == index  # nearest to its own scan


def test_second_call_writes_nothing_and_completes_what_is_missing(tmp_path, files):
    out = tmp_path / "digits"
    assert digits.write_tree(out, files) == 1797
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")}
    gone = out / "val" / "3" / Path(next(n for n in files if n.startswith("val/3/"))).name
    gone.unlink()
    assert digits.write_tree(out, digits.make_tree()) == 1
    assert {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*.jpg")} == files
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items() if path != gone)


@pytest.mark.parametrize("name", ["notes.txt", "train/0/0000.jpg", "val/cats/1.jpg"])
def test_strange_folder_is_refused_and_left_alone(tmp_path, files, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"not overwritten.*got .*expected: .*hint: ") as caught:
        digits.write_tree(tmp_path, files)
    assert name in str(caught.value)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert path.read_bytes() == b"mine"


def test_file_in_the_way_is_refused(tmp_path, files):
    path = tmp_path / "out"
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match="a file"):
        digits.write_tree(path, files)
    assert path.read_bytes() == b"mine"


def test_missing_scikit_learn_names_its_hint(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="hint: pip install scikit-learn"):
        digits.load_scans()
