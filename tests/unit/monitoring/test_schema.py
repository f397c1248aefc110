"""Rows of metrics: each key is checked, wrong ones are refused, and docs/metrics.md names the same keys."""

import re

import pytest

from gcvit.monitoring.schema import KINDS, OPTIONAL, STAGES, TIMED_KEYS, find_faults
from tests.helpers.launching import ROOT

VALUES = {int: 3, float: 0.5, str: "text", list: ["text"], dict: {}, type(None): None}
EACH_KEY = [(kind, key) for kind, keys in KINDS.items() for key in ("step", "time", *keys)]


def make(kind: str) -> dict:
    """A sound row."""
    row = {"step": 1, "kind": kind, "time": 0.5}
    row |= {key: VALUES[types[0]] for key, types in (KINDS[kind] | OPTIONAL.get(kind, {})).items()}
    return row | ({"bound_by": STAGES[0], "stages": dict.fromkeys(STAGES, 0.5)} if kind == "train" else {})


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_row_has_no_fault(kind):
    assert list(find_faults(make(kind))) == []


@pytest.mark.parametrize(("kind", "key"), EACH_KEY)
def test_each_key_is_checked(kind, key):
    sound = make(kind)
    missing = {name: value for name, value in sound.items() if name != key}
    assert any(f"{key} is missing" in fault for fault in find_faults(missing))
    for wrong in (True, {1}):
        assert any(fault.startswith(f"{kind}: {key} is {wrong}") for fault in find_faults({**sound, key: wrong}))


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, key in EACH_KEY if key not in ("step", "time")])
def test_null_is_only_where_it_may_be(kind, key):
    faults = list(find_faults({**make(kind), key: None}))
    assert bool(faults) != (type(None) in KINDS[kind][key])


def test_optional_keys_may_be_missing():
    for kind, keys in OPTIONAL.items():
        for key in keys:
            row = make(kind)
            del row[key]
            assert list(find_faults(row)) == []


def test_what_is_unknown_is_refused():
    assert list(find_faults(make("end") | {"loss": 1.0})) == ["end: loss is unknown"]
    assert len(list(find_faults({"step": 1, "kind": "other", "time": 0.5}))) == 1
    assert len(list(find_faults({}))) == 1


@pytest.mark.parametrize("change", [{"bound_by": "weather"}, {"stages": {}}, {"stages": dict.fromkeys(STAGES[1:], 0)}])
def test_stages_are_those_that_are_timed(change):
    assert list(find_faults(make("train") | change))


def test_keys_that_time_changes_are_keys():
    assert set(TIMED_KEYS) <= {"time", *KINDS["train"]}


# ---- docs/metrics.md -----------------------------------------------------------------------------


def words(cell: str) -> set[str]:
    return set(re.findall(r"`([\w/]+)`", cell))


def table(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    section = (ROOT / "docs/metrics.md").read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_names_all_keys_of_all_kinds():
    told = {kind: words(keys) for kinds, _, keys in table("Rows") for kind in words(kinds)}
    assert told == {kind: {*keys, *OPTIONAL.get(kind, {})} for kind, keys in KINDS.items()}


def test_the_page_names_all_stages_in_order():
    assert [row[0].strip("`") for row in table("What bounds the run")] == list(STAGES)
