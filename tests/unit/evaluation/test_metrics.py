"""Calibration, classes, confusions and mistakes of small tables by hand, and what holds for all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcvit.evaluation.metrics import count_classes, find_confused, find_mistakes, reliability, score
from gcvit.evaluation.predictions import Predictions

CLASSES = ["ant", "bee", "cat", "dog"]


def table(*rows: tuple[int, int, float]) -> Predictions:
    """Rows of label, predicted class, confidence; what is not right has rank 3, but 5 for a dog."""
    labels, predicted, confidences = zip(*rows, strict=True)
    ranks = [0 if label == found else 5 if label == 3 else 3 for label, found, _ in rows]
    return Predictions(
        np.arange(10, 10 + len(rows)),
        np.array(labels, np.int32),
        np.array(ranks, np.int32),
        np.array(predicted, np.int32)[:, None],
        np.array(confidences, np.float32),
    )


TABLE = table((0, 0, 0.95), (0, 1, 0.9), (0, 1, 0.5), (1, 1, 1.0), (3, 0, 0.2), (3, 0, 0.25), (3, 3, 0.7))


def test_classes():
    assert count_classes(TABLE, CLASSES) == [
        {"class": "ant", "num": 3, "correct_top1": 1, "correct_top5": 3},
        {"class": "bee", "num": 1, "correct_top1": 1, "correct_top5": 1},
        {"class": "cat", "num": 0, "correct_top1": 0, "correct_top5": 0},
        {"class": "dog", "num": 3, "correct_top1": 1, "correct_top5": 1},
    ]


def test_confused():
    """Of equally many the lower label first."""
    assert find_confused(TABLE, CLASSES) == [
        {"label": "ant", "predicted": "bee", "num": 2},
        {"label": "dog", "predicted": "ant", "num": 2},
    ]


def test_one_s_own_class_is_no_confusion():
    """ReaL may call an image's own class wrong."""
    found = table((0, 0, 0.5))
    found.ranks[0] = 1
    assert find_confused(found, CLASSES) == []


def test_mistakes_are_the_surest_of_the_worst_classes():
    rows = find_mistakes(TABLE, CLASSES, lambda index: f"{index}.jpg", num_classes=1)
    assert rows == [
        {"key": "11.jpg", "index": 11, "label": "ant", "predicted": "bee", "confidence": pytest.approx(0.9)},
        {"key": "12.jpg", "index": 12, "label": "ant", "predicted": "bee", "confidence": pytest.approx(0.5)},
    ]
    labels = [row["label"] for row in find_mistakes(TABLE, CLASSES, str)]
    assert labels == ["ant", "ant", "dog", "dog"]
    many = table(*[(1, 0, i / 10) for i in range(9)])
    assert [row["index"] for row in find_mistakes(many, CLASSES, str)] == [18, 17, 16, 15]


def test_reliability_by_hand():
    """The edges 1/15 and 1 belong to the ranges below them."""
    bins = reliability(table((0, 0, 1.0), (0, 1, 0.94), (1, 1, 0.96), (2, 0, 0.1)))
    assert [row["num"] for row in bins] == [0, 1, *[0] * 12, 3]
    assert (bins[0]["accuracy"], bins[0]["confidence"]) == (None, None)
    assert (bins[1]["accuracy"], bins[14]["accuracy"]) == (0.0, pytest.approx(2 / 3))
    assert bins[14]["confidence"] == pytest.approx(2.9 / 3)
    assert (bins[0]["low"], bins[14]["high"]) == (0.0, 1.0)


confidence = st.floats(0, 1, width=32)
rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), confidence), min_size=1, max_size=60)


@given(rows)
def test_calibration_is_its_definition(rows):
    found = score(table(*rows), CLASSES, str)
    bins = found["reliability"]
    assert sum(row["num"] for row in bins) == len(rows)
    gaps = 0.0
    for row in bins:
        inside = [(a == b, c) for a, b, c in rows if row["low"] < c <= row["high"] or c == row["low"] == 0]
        assert len(inside) == row["num"]
        gaps += abs(sum(right - sure for right, sure in inside))
    assert found["ece"] == pytest.approx(gaps / len(rows), abs=1e-9)
    assert 0 <= found["ece"] <= 1


@given(rows)
def test_parts_add_up(rows):
    found = score(table(*rows), CLASSES, str)
    num_wrong = sum(a != b for a, b, _ in rows)
    assert sum(row["num"] for row in found["per_class"]) == len(rows)
    assert sum(row["num"] - row["correct_top1"] for row in found["per_class"]) == num_wrong
    assert sum(row["num"] for row in found["confused"]) == num_wrong  # 4 classes have 12 pairs: all are named
    assert len({row["index"] for row in found["mistakes"]}) == len(found["mistakes"]) <= num_wrong


def test_a_model_that_has_diverged():
    found = score(table((0, 1, np.nan), (1, 1, 0.5)), CLASSES, str)
    assert found["ece"] == pytest.approx(0.25)
    assert found["mistakes"][0]["confidence"] is None
