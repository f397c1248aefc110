"""What a run says of itself: rows, TensorBoard events and lines or a bar, in a world of one."""

import json
import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gcvit.config.load import load_config
from gcvit.config.schema import Config
from gcvit.monitoring import metric_logger as metrics_module
from gcvit.monitoring.metric_logger import MetricLogger
from gcvit.monitoring.schema import STAGES
from gcvit.monitoring.step_timer import Seconds
from gcvit.optim.clip_grad import StepResult
from gcvit.runtime.distributed import World, join_world
from tests.helpers.launching import ROOT

pytestmark = pytest.mark.gpu
BATCH_SIZE = 32  # of golden.yaml
TOTAL_STEPS = 20
EVALUATION = {
    "top1": 71.25,
    "top5": 90.0,
    "loss": 1.5,
    "num_samples": 31,
    "correct_top1": 22,
    "num_skipped": 0,
    "seconds": 2.5,
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with join_world() as joined:
        yield joined


@pytest.fixture
def config(tmp_path) -> Config:
    config, _ = load_config(ROOT / "tests/helpers/golden.yaml", [f"output_dir={tmp_path}"])
    config.run_dir.mkdir()
    return config


@pytest.fixture
def logged(caplog) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "gcvit")
    return caplog


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that goes on only where a test says so: `clock.now += seconds`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: clock.now)
    return clock


def begin(config: Config, world: World, first_step: int = 0) -> MetricLogger:
    return MetricLogger(config, world, first_step=first_step, total_steps=TOTAL_STEPS, train_flops=2e9, peak_flops=1e11)


def outcome(world: World, applied: bool = True, norm: float = 0.5) -> StepResult:
    norm = norm if applied else float("inf")
    return StepResult(torch.tensor(norm, device=world.device), torch.tensor(float(applied), device=world.device))


def add(metrics: MetricLogger, world: World, mean_loss: float, applied: bool = True) -> StepResult:
    result = outcome(world, applied)
    total, num_correct = torch.tensor(mean_loss * BATCH_SIZE), torch.tensor(BATCH_SIZE // 4)
    metrics.add(total.to(world.device), num_correct.to(world.device), result)
    return result


SECONDS = Seconds({"data": 2.0, "compute": 6.0}, {"storage": 0.5, "decoding": 1.5})


def log(metrics: MetricLogger, step: int, lr: float, result: StepResult) -> None:
    metrics.log_step(step, lr, result, SECONDS, num_corrupt=0)


def rows(config: Config) -> list[dict]:
    """But for the time of day and the memory, which are what they are."""
    found = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("time", "memory_bytes")} for row in found]


# ---- rows ----------------------------------------------------------------------------------------


def test_a_row_holds_the_mean_over_its_interval(config, world, clock):
    metrics = begin(config, world)
    for step, loss in enumerate([4.0, 2.0, 1.0, 0.5, 0.25], start=1):
        clock.now += 2
        result = add(metrics, world, loss)
        if step in (3, 5):
            log(metrics, step, 1e-3 * step, result)
    metrics.close()
    speed = pytest.approx(BATCH_SIZE / 2)
    common = {"kind": "train", "train_top1": 25.0, "grad_norm": 0.5, "refused_steps": 0, "num_corrupt": 0}
    common |= {"images_per_second": speed, "images_per_second_per_device": speed, "mfu": pytest.approx(0.32)}
    common |= {"data_wait": 0.25, "bound_by": "compute", "bound_share": 0.75, "slowest_rank": 0}
    # Of the 2 s that were waited for data, the loader needed a quarter for its storage.
    spent = {**dict.fromkeys(STAGES, 0.0), "storage": 0.5, "decoding": 1.5, "compute": 6.0}
    first = {"seconds": 6.0, "seconds_left": 34.0, "stages": {k: pytest.approx(v / 3) for k, v in spent.items()}}
    second = {"seconds": 4.0, "seconds_left": 30.0, "stages": {k: pytest.approx(v / 2) for k, v in spent.items()}}
    assert rows(config) == [
        {"step": 3, "loss": pytest.approx(7 / 3), "lr": pytest.approx(3e-3), **common, **first},
        {"step": 5, "loss": pytest.approx(0.375), "lr": pytest.approx(5e-3), **common, **second},
    ]


def test_refused_steps_are_counted_and_said(config, world, logged):
    metrics = begin(config, world)
    for step, applied in enumerate([True, False, False, True, True, True], start=1):
        result = add(metrics, world, 1.0, applied)
        if step % 3 == 0:
            log(metrics, step, 1e-3, result)
    metrics.close()
    assert [row["refused_steps"] for row in rows(config)] == [2, 0]
    first, second = logged.messages
    assert "refused 2" in first.lower()
    assert "refused" not in second.lower()


def test_an_interval_of_nothing_but_refused_steps_is_null(config, world, logged):
    """In strict JSON; the images per second are known all the same."""
    metrics = begin(config, world)
    log(metrics, 1, 1e-3, add(metrics, world, 1.0, applied=False))
    metrics.close()
    (row,) = rows(config)
    assert (row["loss"], row["grad_norm"], row["refused_steps"]) == (None, None, 1)
    assert row["images_per_second"] > 0
    assert "loss nan" in logged.messages[0]
    tags = EventAccumulator(str(config.run_dir)).Reload().Tags()["scalars"]
    assert "train/refused_steps" in tags
    assert "train/loss" not in tags


def test_a_checkpoint_is_a_row_with_its_stall(config, world, logged):
    metrics = begin(config, world)
    found = {"stall_seconds": 0.25, "write_seconds": 2.5, "bytes": 1_234_000_000}
    metrics.log_checkpoint(10, found)
    metrics.close()
    assert rows(config) == [{"step": 10, "kind": "checkpoint", **found}]
    assert logged.messages == ["step 10/20  saved 1.23 GB in 2.5 s  training stopped for 0.25 s"]


def test_what_is_off_the_clock_does_not_slow_the_images_down(config, world, clock):
    metrics = begin(config, world)
    clock.now += 4
    with metrics.paused():  # an evaluation in the middle of an interval
        clock.now += 500
    result = add(metrics, world, 1.0)
    clock.now += 4
    log(metrics, 1, 1e-3, result)
    with metrics.paused():  # and one right behind a row
        clock.now += 500
    clock.now += 16
    log(metrics, 2, 1e-3, add(metrics, world, 1.0))
    metrics.close()
    assert [row["images_per_second"] for row in rows(config)] == [BATCH_SIZE / 8, BATCH_SIZE / 16]


def test_an_evaluation_is_a_row_of_its_kind(config, world, logged):
    metrics = begin(config, world)
    found = EVALUATION
    metrics.log_evaluation(10, "ema", found)
    metrics.close()
    assert rows(config) == [{"step": 10, "kind": "val/ema", **found}]
    assert logged.messages == ["step 10/20  ema: top-1 71.25 %  loss 1.5000"]


def test_a_resume_drops_the_rows_that_are_done_again(config, world):
    """And a last line that was cut off, wherever it was cut."""
    old = [{"step": step, "kind": kind, "loss": 1.0} for step in (5, 10, 15) for kind in ("train", "val/weights")]
    text = "".join(json.dumps(row) + "\n" for row in old)
    torn = json.dumps({"step": 16, "kind": "train", "loss": 1.0})
    for cut in (0, 1, len(torn) // 2, len(torn)):
        (config.run_dir / "metrics.jsonl").write_text(text + torn[:cut])
        metrics = begin(config, world, first_step=10)
        assert rows(config) == old[:4], cut
        log(metrics, 11, 1e-3, add(metrics, world, 2.0))
        metrics.close()
        assert [row["step"] for row in rows(config)] == [5, 5, 10, 10, 11], cut


def test_a_torn_row_of_a_kept_step_is_dropped(config, world):
    """Wherever it was cut: a row may end like a whole one, behind its stages."""
    torn = json.dumps({"step": 10, "kind": "train", "stages": {"compute": 1.0}})
    for cut in range(len(torn)):
        (config.run_dir / "metrics.jsonl").write_text('{"step": 5, "kind": "train"}\n' + torn[:cut])
        begin(config, world, first_step=10).close()
        assert [row["step"] for row in rows(config)] == [5], cut


def test_a_run_that_had_finished_writes_nothing_more(config, world):
    metrics = begin(config, world)
    metrics.log_end(TOTAL_STEPS, "finished", 640, 50.0)
    metrics.close()
    before = {path.name: path.read_bytes() for path in config.run_dir.iterdir()}
    metrics = begin(config, world, first_step=TOTAL_STEPS)
    metrics.log_start(TOTAL_STEPS, {})
    metrics.log_end(TOTAL_STEPS, "finished", 640, 50.0)
    metrics.close()
    assert {path.name: path.read_bytes() for path in config.run_dir.iterdir()} == before


def test_a_fresh_start_over_old_rows_keeps_none(config, world):
    (config.run_dir / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\n')
    begin(config, world).close()
    assert rows(config) == []


# ---- TensorBoard ---------------------------------------------------------------------------------


def test_tensorboard_reads_what_stands_in_the_rows(config, world):
    """Over a resume too: what was done again shows once."""
    for first_step in (0, 4):
        metrics = begin(config, world, first_step)
        for step in range(first_step + 1, first_step + 7):
            result = add(metrics, world, 1 / (step + first_step))
            if step % 2 == 0:
                log(metrics, step, 1e-3 / step, result)
        metrics.log_evaluation(first_step + 6, "weights", {**EVALUATION, "top1": 50.0 + first_step, "loss": 2.0})
        metrics.close()
    written = rows(config)
    assert [row["step"] for row in written if row["kind"] == "train"] == [2, 4, 6, 8, 10]
    events = EventAccumulator(str(config.run_dir), size_guidance={"scalars": 0}).Reload()
    names = {f"{row['kind']}/{k}" for row in written for k, v in row.items() if isinstance(v, int | float)}
    names -= {f"{row['kind']}/step" for row in written}
    extra = {f"train/stages/{stage}" for stage in STAGES} | {"train/memory_bytes"}
    assert set(events.Tags()["scalars"]) == names | extra
    for name in names:
        kind, _, key = name.rpartition("/")
        wanted = [(row["step"], row[key]) for row in written if row["kind"] == kind]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted], name
