"""The benchmark of the model: it counts rightly, tells a wrong attention, names what misses a bar, and runs."""

import json

import pytest
import torch

from benchmarks import model as benchmark
from benchmarks.model_check import check_paths
from benchmarks.model_contest import Entry, count_flops, hold_contest
from gcvit.model import VARIANTS, attention
from tests.helpers.launching import python, succeed

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_flops_are_twice_the_multiply_adds() -> None:
    for name in ("gc_vit_xxtiny", "gc_vit_base"):
        assert count_flops(name) == pytest.approx(2e9 * VARIANTS[name].counted_gmacs, rel=1e-3)


def test_a_wrong_path_is_told_from_right_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.attend_fused
    monkeypatch.setattr(attention, "attend_fused", lambda q, k, v, bias, scale: right(q, k, v, 0.9 * bias, scale))
    verdicts = check_paths(["reference", "sdpa"], CPU)
    assert [(v.path, v.dtype, v.is_right) for v in verdicts] == [
        ("reference", torch.float32, True),
        ("reference", torch.bfloat16, True),
        ("sdpa", torch.float32, False),
        ("sdpa", torch.bfloat16, False),
    ]


def test_a_path_that_cannot_run_is_told() -> None:
    verdicts = check_paths(["no such path"], CPU)
    assert not any(v.is_right for v in verdicts)
    assert "unknown attention" in str(verdicts[0])


def test_a_contender_that_fails_leaves_the_others_in() -> None:
    entries = [Entry("no such path"), Entry("reference")]
    result = hold_contest("gc_vit_xxtiny", entries, CPU, batch_size=1, num_rounds=1, runs_per_turn=1, trace=None)
    assert list(result["failed"]) == ["no such path"]
    assert "unknown attention" in result["failed"]["no such path"]
    (row,) = result["modes"]["training"].values()
    assert row["images_per_s"] == pytest.approx(1 / row["seconds"][0])
    expected_mfu = 3 * count_flops("gc_vit_xxtiny") * row["images_per_s"] / result["product_rate"]
    assert row["mfu"] == pytest.approx(expected_mfu)


def contest(variant: str, auto: str, rows: dict[str, dict]) -> dict:
    return {"variant": variant, "auto": auto, "modes": {"training": rows}, "failed": {}}


@pytest.mark.parametrize(
    ("eager", "compiled", "missed"),
    [(1.05, 1.05, []), (1.049, 1.2, ["x timm is 1.049"]), (1.2, None, ["x timm compiled is not measured"])],
)
def test_bars_of_a_cpu(eager: float, compiled: float | None, missed: list[str]) -> None:
    rows = {"reference": {"ratios": {"timm": eager}}, "timm compiled": {"ratios": {}}}
    if compiled:
        rows["reference compiled"] = {"ratios": {"timm compiled": compiled}}
    misses = benchmark.find_misses(contest("gc_vit_tiny", "reference", rows), CPU)
    assert len(misses) == len(missed)
    assert all(words in miss for words, miss in zip(missed, misses, strict=True))


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, None),
        ({"mfu": 0.24}, "MFU is 0.240"),
        ({"peak_bytes": 61}, "peak memory x timm's is 0.610"),
        ({"ratios": {"timm": 2.4, "timm compiled": 1.5}}, "x timm is 2.400"),
        ({"ratios": {"timm": 2.5, "timm compiled": 1.4}}, "x timm compiled is 1.400"),
    ],
)
def test_bars_of_a_gpu(change: dict, missed: str | None) -> None:
    ours = {"ratios": {"timm": 2.5, "timm compiled": 1.5}, "mfu": 0.25, "peak_bytes": 60}
    rows = {"timm": {"peak_bytes": 120}, "timm compiled": {"peak_bytes": 100}, "triton compiled": ours | change}
    misses = benchmark.find_misses(contest("gc_vit_base", "triton", rows), GPU)
    assert len(misses) == (missed is not None)
    assert all(missed in miss for miss in misses)


@pytest.mark.slow
def test_it_runs(tmp_path) -> None:
    file, trace = tmp_path / "results.json", tmp_path / "trace"
    words = ["--quick", "--models", "gc_vit_xxtiny", "--json", file, "--profile", trace]
    done = succeed(python("-m", "benchmarks.model", *words, timeout=250))
    assert "sdpa in float32: right" in done.stdout
    assert "the ten most expensive operations" in done.stdout
    (found,) = json.loads(file.read_text())["contests"]
    assert not found["failed"]
    for mode in ("forward", "training"):
        assert set(found["modes"][mode]) == {"reference", "sdpa", "skipping", "timm"}
        assert found["modes"][mode]["timm"]["ratios"] == {"timm": 1.0}
        assert all(row["images_per_s"] > 0 and row["mfu"] > 0 for row in found["modes"][mode].values())
    assert (tmp_path / "trace.gc_vit_xxtiny.json").stat().st_size > 0
