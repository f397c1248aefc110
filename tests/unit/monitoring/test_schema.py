"""Rows of metrics: each key is checked, wrong ones are refused, and docs/metrics.md names the same keys."""

import math
import re

import pytest

from gcvit.monitoring.schema import KINDS, STAGES, TIMED_KEYS, EndRow, TrainRow, find_faults, optional_keys, types_of
from tests.helpers.launching import ROOT

VALUES = {int: 3, float: 0.5, str: "text", list: ["text"], dict: {}, type(None): None}
EACH_KEY = [(kind, key) for kind in KINDS for key in types_of(kind) if key != "kind"]
REQUIRED = [(kind, key) for kind, key in EACH_KEY if key not in optional_keys(kind)]


def make(kind: str) -> dict:
    """Make a valid row."""
    row = {key: VALUES[types[0]] for key, types in types_of(kind).items()} | {"kind": kind}
    return row | ({"bound_by": STAGES[0], "stages": dict.fromkeys(STAGES, 0.5)} if kind == "train" else {})


@pytest.mark.parametrize("kind", KINDS)
def test_a_valid_row_has_no_fault(kind):
    assert list(find_faults(make(kind))) == []


@pytest.mark.parametrize(("kind", "key"), REQUIRED)
def test_each_key_is_checked(kind, key):
    valid = make(kind)
    missing = {name: value for name, value in valid.items() if name != key}
    assert any(f"{key} is missing" in fault for fault in find_faults(missing))
    for wrong in (True, {1}):
        assert any(fault.startswith(f"{kind}: {key} is {wrong}") for fault in find_faults({**valid, key: wrong}))


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, key in EACH_KEY if key not in ("step", "time")])
def test_null_is_only_where_it_may_be(kind, key):
    faults = list(find_faults({**make(kind), key: None}))
    assert bool(faults) != (type(None) in types_of(kind)[key] and key not in optional_keys(kind))


def test_optional_keys_may_be_missing():
    for kind in KINDS:
        for key in optional_keys(kind):
            row = make(kind)
            del row[key]
            assert list(find_faults(row)) == []
    assert optional_keys("end") == {"best_top1"}


def test_a_row_is_written_as_it_is_checked():
    common = {"step": 1, "kind": "end", "time": 0.5}
    assert list(find_faults(common | EndRow("finished", 64, 50.0).as_dict())) == []
    assert EndRow("preempted", 64).as_dict() == {"outcome": "preempted", "samples": 64}
    row = TrainRow(**{key: value for key, value in make("train").items() if key not in common} | {"loss": math.nan})
    assert row.as_dict()["loss"] is None
    assert list(find_faults(common | {"kind": "train"} | row.as_dict())) == []


def test_a_writer_cannot_write_an_unknown_key():
    with pytest.raises(TypeError, match="loss"):
        KINDS["end"](outcome="finished", samples=64, loss=1.0)


def test_what_is_unknown_is_refused():
    assert list(find_faults(make("end") | {"loss": 1.0})) == ["end: loss is unknown"]
    assert len(list(find_faults({"step": 1, "kind": "other", "time": 0.5}))) == 1
    assert len(list(find_faults({}))) == 1


@pytest.mark.parametrize("change", [{"bound_by": "weather"}, {"stages": {}}, {"stages": dict.fromkeys(STAGES[1:], 0)}])
def test_stages_are_those_that_are_timed(change):
    assert list(find_faults(make("train") | change))


def test_keys_that_time_changes_are_keys():
    assert set(TIMED_KEYS) <= set(types_of("train"))


# ---- docs/metrics.md -----------------------------------------------------------------------------


def words(cell: str) -> set[str]:
    return set(re.findall(r"`([\w/]+)`", cell))


def table(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    section = (ROOT / "docs/metrics.md").read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_names_all_keys_of_all_kinds():
    named = {kind: words(keys) for kinds, _, keys in table("Rows of metrics.jsonl") for kind in words(kinds)}
    assert named == {kind: set(types_of(kind)) - {"step", "kind", "time"} for kind in KINDS}


def test_the_page_names_all_stages_in_order():
    assert [row[0].strip("`") for row in table("What bounds the speed")] == list(STAGES)
