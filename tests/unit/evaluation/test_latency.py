"""Latencies by a clock of our own."""

import pytest
import torch

from gcvit.evaluation import latency


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    made = Clock()
    monkeypatch.setattr(latency, "time", made)
    return made


def test_percentiles_and_throughput(clock):
    """Passes of 1 to 100 ms; the warm-up, which is slow, does not count."""
    durations = iter([9.0, *[i / 1000 for i in range(1, 101)]])

    def run() -> None:
        clock.now += next(durations)

    row = latency.measure(run, 8, torch.device("cpu"), seconds=5.049)
    assert row["num_passes"] == 100
    assert (row["p50_ms"], row["p90_ms"]) == (pytest.approx(50.5), pytest.approx(90.1))
    assert row["p99_ms"] == pytest.approx(99.01)
    assert row["images_per_second"] == pytest.approx(8 * 100 / 5.05)


@pytest.mark.parametrize(("duration", "num_passes"), [(60.0, 10), (1e-6, 1000)])
def test_slow_and_quick_models_end_too(clock, duration, num_passes):
    def run() -> None:
        clock.now += duration

    row = latency.measure(run, 1, torch.device("cpu"), seconds=0.01)
    assert row["num_passes"] == num_passes
