"""What a call evaluates: names of its sets, and ranks that would not evaluate the same."""

from argparse import Namespace
from types import SimpleNamespace

import pytest

from gcvit.errors import UserError
from gcvit.evaluation import suite
from gcvit.evaluation.label_sets import ImageSet


def name_sets(monkeypatch, *places: str) -> list[str]:
    def open_set(given: str, split: str, *cache: object) -> ImageSet:
        name = given.partition("=")[0] if "=" in given else split
        return ImageSet(name, None, "/", split, SimpleNamespace())

    monkeypatch.setattr(suite, "open_set", open_set)
    sets = suite.open_sets(Namespace(data_dir=places, split="val", cache_dir=None, cache_bytes=None))
    return [one.name for one in sets]


def test_sets_of_one_kind_are_told_apart(monkeypatch):
    assert name_sets(monkeypatch, "/a", "v2=/b") == ["val", "v2"]
    assert name_sets(monkeypatch, "v2=/x/top", "v2=/x/freq") == ["v2-top", "v2-freq"]
    assert name_sets(monkeypatch, "/a/wds", "/b/wds", "r=/r") == ["val-wds-1", "val-wds-2", "r"]


def test_the_same_place_twice_is_refused_without_its_password(monkeypatch):
    with pytest.raises(UserError, match="the same set twice") as caught:
        name_sets(monkeypatch, "https://me:secret@host/x", "https://me:secret@host/x")
    assert "secret" not in str(caught.value)


def test_ranks_that_find_other_weights_are_reported():
    alike = SimpleNamespace(gather=lambda found: [found, found])
    suite._check_alike("weights", [("runs/a", 5)], alike)
    other = SimpleNamespace(gather=lambda found: [found, [found[0], ("runs/b", 9)]])
    with pytest.raises(UserError, match=r"different weights.*runs/b \(5\) on rank 0, runs/b \(9\) on rank 1"):
        suite._check_alike("weights", [("runs/a", 5), ("runs/b", 5)], other)
