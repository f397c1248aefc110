"""A loss or gradient that is not finite, on one of 2 processes: all skip that step alike, say whose it was, and stop.

One loss becomes NaN while its gradient stays finite, and one gradient becomes infinite while its loss stays finite: per
engine and precision, by injection into the real training (`nonfinite_worker.py`).
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gcvit.checkpoint.store import open_checkpoint
from tests.helpers.launching import succeed, torchrun
from tests.helpers.trainings import write_noise
from tests.integration.nonfinite_worker import BAD_RANK, ENGINES, KINDS

# Slow: the one run takes over a minute. tests/unit/training/test_nonfinite.py tests the rule itself.
pytestmark = [pytest.mark.dist, pytest.mark.slow]
each_engine = pytest.mark.parametrize("engine", ENGINES)
each_precision = pytest.mark.parametrize("precision", ["fp32", "bf16"])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Images of noise at the model's own size, so that pixels name their file."""
    root = tmp_path_factory.mktemp("data")
    write_noise(root, size=32, train=25)
    return root


@pytest.fixture(scope="module")
def out(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("nonfinite")
    succeed(torchrun(2, Path(__file__).with_name("nonfinite_worker.py"), data, out, timeout=500))
    return out


@pytest.fixture(scope="module")
def report(out) -> dict[str, list[dict]]:
    """What each rank saw, by "KIND ENGINE PRECISION"."""
    return json.loads((out / "report.json").read_text())


def rows_of(out: Path, run: str, kind: str) -> list[dict]:
    path = out / run.replace(" ", "-") / "metrics.jsonl"
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] == kind]


def name_of(pixels: list[int], data: Path) -> str:
    """The training image that has these pixels."""
    paths = data.glob("train/*/*.png")
    (found,) = (path for path in paths if np.asarray(Image.open(path)).reshape(-1).tolist() == pixels)
    return str(found.relative_to(data / "train"))


@each_engine
@each_precision
def test_all_ranks_skip_a_step_alike(engine, precision, report):
    for seen in report[f"apart {engine} {precision}"]:
        assert seen["error"] is None
        assert len(seen["digests"]) == 6
        for step, (before, after) in enumerate(seen["digests"]):
            assert (before == after) == (step in KINDS["apart"]), step
        assert [after - before for before, after in seen["updates"]] == [1, 1, 0, 1, 0, 1]


@each_engine
@each_precision
def test_step_rank_and_sample_are_named(engine, precision, report, data, out):
    run = f"apart {engine} {precision}"
    bad = rows_of(out, run, "bad_step")
    assert all(row.pop("time") for row in bad)
    assert bad == [
        {
            "step": step + 1,
            "kind": "bad_step",
            "rank": BAD_RANK,
            "what": what,
            "samples": [name_of(report[run][BAD_RANK]["images"][str(step)], data)],
            "num_samples": 1,
        }
        for step, what in KINDS["apart"].items()
    ]
    rows = rows_of(out, run, "train")
    assert [row["refused_steps"] for row in rows] == [1, 1]
    assert all(0 < row["loss"] < 10 for row in rows), "a bad step hides the loss of the good ones"


@each_engine
def test_a_hopeless_run_stops_with_a_checkpoint_from_before(engine, report, data, out):
    ranks = report[f"row {engine} fp32"]
    message = ranks[0]["error"]
    assert ranks[1]["error"] == message
    assert "3 updates in a row" in message
    assert "steps 4 to 6" in message
    assert "--replay 4" in message
    for step, what in KINDS["row"].items():
        name = name_of(ranks[BAD_RANK]["images"][str(step)], data)
        assert f"step {step + 1}, {what} of 1 samples on rank {BAD_RANK}: {name}" in message
    checkpoints = sorted((out / f"row-{engine}-fp32" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step_00000003"]
    assert str(checkpoints[0]) in message
    state = open_checkpoint(checkpoints[0]).state
    assert (state.step, state.samples, state.counters.updates) == (3, 96, 3)
    for seen in ranks:
        assert seen["again"] == {"step": 3, "samples": 96, "digest": seen["digests"][2][1]}


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@each_precision
def test_steps_are_not_read_by_the_host(engine, precision, report):
    """Neither good ones nor bad ones, but for the logging after the third and sixth."""
    for seen in report[f"apart {engine} {precision}"]:
        assert seen["reads"][:3] == [0, 0, 0]
        assert seen["reads"][3] > 0, "logging reads, and this counts it"
        assert seen["reads"][4:6] == [0, 0]
