import base64
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gcvit.report.evaluation import describe
from gcvit.report.run_data import read_record
from gcvit.report.samples import find_columns, read_images, show_samples
from tests.helpers.run_folders import write_evaluation, write_images, write_run, write_samples


def pixel(uri):
    kind, content = uri.split(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content))).getpixel((4, 4))


@given(num=st.integers(1, 40), columns=st.integers(1, 40), side=st.integers(1, 64))
def test_columns_follow_from_the_size(num, columns, side):
    columns = min(num, columns)
    size = (columns * side, -(-num // columns) * side)
    assert find_columns(size, num) == columns


def test_a_picture_that_is_no_grid_is_not_cut():
    assert find_columns((100, 70), 6) is None


def test_samples_are_cut_and_named(tmp_path):
    folder = write_run(tmp_path / "a", 2)
    for step in (10, 20, 30):
        write_samples(folder, step, num=5, num_columns=3)
    grids = show_samples(read_record(folder), several=False)
    assert [grid.title for grid in grids] == ["Step 10", "Step 30"]
    tiles = grids[0].tiles
    assert [tile.label for tile in tiles] == ["apple", "brick", "cloud", "drum", "apple"]
    assert tiles[0].targets == "apple: 70\u202f% · brick: 20\u202f% · cloud: 5\u202f%"
    with Image.open(folder / "samples" / "step_10.png") as picture:
        for tile, place in zip(tiles, [(4, 4), (52, 4), (100, 4), (4, 52), (52, 52)], strict=True):
            expected = picture.getpixel(place)
            assert all(abs(a - b) < 12 for a, b in zip(pixel(tile.picture), expected, strict=True))


def test_a_missing_sample_picture_is_reported(tmp_path):
    folder = write_run(tmp_path / "a", 2)
    write_samples(folder, 10)
    (folder / "samples" / "step_10.png").write_bytes(b"no picture")
    (grid,) = show_samples(read_record(folder), several=False)
    assert not grid.tiles
    assert "could not be read" in grid.note


@pytest.fixture
def evaluated(tmp_path):
    write_images(tmp_path / "data")
    folder = write_run(tmp_path / "a", 2)
    write_evaluation(folder, tmp_path / "data")
    return folder


def show(folder):
    record = read_record(folder)
    return describe(record, 0, record.evaluations[0], has_siblings=False)


def test_worst_classes_come_with_their_pictures(evaluated):
    detail = show(evaluated)
    assert [(worst.name, worst.score) for worst in detail.worst] == [
        ("drum", "3 of 12 correct"),
        ("brick", "7 of 12 correct"),
        ("apple", "9 of 12 correct"),
    ]
    mistake = detail.worst[0].mistakes[0]
    assert (mistake.predicted, mistake.confidence) == ("apple", "90\u202f%")
    red, green, blue = pixel(mistake.picture)
    assert red > green > blue  # a drum's colour
    assert detail.notes == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dir": "/nowhere"}, "not at /nowhere/val any more"),
        ({"dir": "https://host/data"}, "downloads nothing"),
        ({"sha256": "0" * 64}, "data differs"),
        ({"dir": None}, "does not name the folder"),
    ],
)
def test_without_the_images_there_is_a_sentence(evaluated, change, sentence):
    file = evaluated / "evaluations" / "val.json"
    evaluation = json.loads(file.read_text())
    evaluation["data"] |= change
    file.write_text(json.dumps(evaluation))
    detail = show(evaluated)
    assert sentence in " ".join(detail.notes)
    assert detail.worst
    assert not any(mistake.picture for worst in detail.worst for mistake in worst.mistakes)


def test_an_image_that_is_gone_is_counted(tmp_path):
    write_images(tmp_path / "data")
    (tmp_path / "data/val/apple/1.png").write_bytes(b"cut off")
    pictures, sentence = read_images({"dir": str(tmp_path / "data"), "split": "val"}, [0, 1, 99])
    assert list(pictures) == [0]
    assert sentence == "2 of the pictures could not be read."
