"""The benchmark of predicted memory runs, keeps its bar on small models, and can miss it."""

import json

import pytest

from benchmarks import plan
from tests.helpers.launching import python, succeed


@pytest.mark.slow
def test_predicted_peaks_are_near_the_measured_ones(tmp_path):
    file = tmp_path / "plan.json"
    told = succeed(python("-m", "benchmarks.plan", "--quick", "--check", "--json", file)).stdout
    result = json.loads(file.read_text())
    assert len(result["rows"]) == len(plan.grid(quick=True, on_gpu=False)) == 10
    assert result["median"] <= result["worst"] <= plan.BAR
    assert f"worst {result['worst']:.1%}, median {result['median']:.1%}" in told


def test_a_missed_bar_is_named(monkeypatch, capsys):
    cases = plan.grid(quick=True, on_gpu=False)[:2]
    monkeypatch.setattr(plan, "grid", lambda *_: cases)
    monkeypatch.setattr(plan, "measure", lambda cases: {str(case): 100 for case in cases})
    rows = [{"predicted_bytes": n, "held_bytes": 1, "moment": "forward"} for n in (95, 120)]
    monkeypatch.setattr(plan, "predict", lambda *_: iter(rows))
    monkeypatch.setattr("sys.argv", ["plan", "--check"])
    with pytest.raises(SystemExit) as stopped:
        plan.main()
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert "worst 20.0%, median 12.5%, bar 10%" in printed
    assert f"Missed: {cases[1]}: +20.0%" in printed


def test_the_grid_has_every_engine_and_mode_at_batches_of_8_or_more():
    for quick, on_gpu in ((False, False), (False, True)):
        cases = plan.grid(quick, on_gpu)
        assert len(cases) == len(set(map(str, cases)))
        assert {case.engine for case in cases} >= set(plan.ENGINES)
        assert {case.mode for case in cases} == set(plan.MODES)
        assert min(case.batch for case in cases) >= 8
