"""Compute calibration, per-class accuracy, confusions and mistakes of a table of predictions, in pure NumPy.

A table has one row for each sample in the source's order, for any number of ranks; so its sums are equal, too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gcvit.evaluation.predictions import Predictions

NUM_BINS = 15
NUM_CONFUSED, NUM_WORST, NUM_MISTAKES = 20, 12, 4  # pairs; classes; mistakes of each


def score(found: Predictions, classes: Sequence[str], key_of: Callable[[int], str]) -> dict[str, Any]:
    """Compute all scores of a table as plain values: ece, reliability, per_class, confused, mistakes.

    `key_of` names a sample by its index. Shares are in [0, 1].
    """
    bins = reliability(found)
    return {
        "ece": sum(row["num"] * abs(row["confidence"] - row["accuracy"]) for row in bins if row["num"]) / len(found),
        "reliability": bins,
        "per_class": count_classes(found, classes),
        "confused": find_confused(found, classes),
        "mistakes": find_mistakes(found, classes, key_of),
    }


def reliability(found: Predictions) -> list[dict[str, Any]]:
    """Compute accuracy and mean confidence in 15 equal ranges of confidence, each (low, high].

    Mean confidence and accuracy of a range are None if no sample falls into it. Their differences, weighted by the
    numbers, are the expected calibration error (Guo et al., ICML 2017). A confidence that is NaN counts as 0.
    """
    confidences = np.nan_to_num(found.confidences.astype(np.float64), nan=0.0)
    edges = np.arange(NUM_BINS + 1) / NUM_BINS
    bins = np.clip(np.searchsorted(edges, confidences, side="left") - 1, 0, NUM_BINS - 1)
    num = np.bincount(bins, minlength=NUM_BINS).tolist()
    correct = np.bincount(bins[found.ranks < 1], minlength=NUM_BINS).tolist()
    sums = np.bincount(bins, weights=confidences, minlength=NUM_BINS).tolist()
    return [
        {
            "low": float(edges[i]),
            "high": float(edges[i + 1]),
            "num": num[i],
            "confidence": sums[i] / num[i] if num[i] else None,
            "accuracy": correct[i] / num[i] if num[i] else None,
        }
        for i in range(NUM_BINS)
    ]


def count_classes(found: Predictions, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Count the samples of each class and the correct ones, in the order of the labels."""
    counts = (_count(found.labels[chosen], classes) for chosen in (slice(None), found.ranks < 1, found.ranks < 5))
    return [
        {"class": name, "num": num, "correct_top1": top1, "correct_top5": top5}
        for name, num, top1, top5 in zip(classes, *counts, strict=True)
    ]


def find_confused(found: Predictions, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Find the pairs (label, predicted) of misclassified samples, the most frequent first."""
    is_wrong = (found.ranks > 0) & (found.labels != found.top[:, 0])  # one's own class may be no right one
    codes = found.labels[is_wrong].astype(np.int64) * len(classes) + found.top[is_wrong, 0]
    pairs, nums = np.unique(codes, return_counts=True)
    order = np.argsort(-nums, kind="stable")[:NUM_CONFUSED]
    return [
        {"label": classes[pair // len(classes)], "predicted": classes[pair % len(classes)], "num": num}
        for pair, num in zip(pairs[order].tolist(), nums[order].tolist(), strict=True)
    ]


def find_mistakes(
    found: Predictions, classes: Sequence[str], key_of: Callable[[int], str], num_classes: int = NUM_WORST
) -> list[dict[str, Any]]:
    """Find the most confident mistakes of the classes with the lowest accuracy."""
    num, correct = _count(found.labels, classes), _count(found.labels[found.ranks < 1], classes)
    accuracy = [right / of if of else 2.0 for right, of in zip(correct, num, strict=True)]  # 2: no sample, no mistake
    worst = np.argsort(accuracy, kind="stable")[:num_classes]
    rows: list[int] = []
    for label in worst:
        wrong = np.flatnonzero((found.labels == label) & (found.ranks > 0))
        rows += wrong[np.argsort(-found.confidences[wrong], kind="stable")][:NUM_MISTAKES].tolist()
    return [
        {
            "key": key_of(index := int(found.indices[row])),
            "index": index,
            "label": classes[found.labels[row]],
            "predicted": classes[found.top[row, 0]],
            "confidence": _finite(float(found.confidences[row])),
        }
        for row in rows
    ]


def _count(labels: npt.NDArray[np.int32], classes: Sequence[str]) -> list[int]:
    counts: list[int] = np.bincount(labels, minlength=len(classes)).tolist()
    return counts


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
