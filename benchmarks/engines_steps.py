"""Measure an engine's step beside ddp's. Used by `benchmarks.engines`."""

import statistics
import time
from typing import Any

from benchmarks.engines_crew import Crew, Training

BARS = {"fsdp": 1.10, "zero1": 1.10, "zero2": 1.10, "zero3": 1.40}  # times the step of ddp, at most
WARM_UP = 2


def time_step(training: Training) -> tuple[float, float]:
    """Measure the seconds of a step: wall time, and processor time."""
    training.synchronize()
    start, start_of_cpu = time.perf_counter(), time.process_time()
    training.step()
    training.synchronize()
    return time.perf_counter() - start, time.process_time() - start_of_cpu


def measure_steps(crews: dict[str, Crew], quick: bool) -> dict[str, Any]:
    """Measure each round's step of each engine: seconds of the slowest rank, and the ratio to ddp's in that round."""
    seconds: dict[str, list[float]] = {name: [] for name in crews}
    of_cpu: dict[str, list[float]] = {name: [] for name in crews}
    names = list(crews)
    num_rounds = 3 if quick else 21
    for turn in range(WARM_UP + num_rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            ranks = crews[name].call(time_step)
            if turn >= WARM_UP:
                seconds[name].append(max(wall for wall, _ in ranks))
                of_cpu[name].append(sum(cpu for _, cpu in ranks))
    rows = {}
    for name in names:
        ratios = [own / ddp for own, ddp in zip(seconds[name], seconds["ddp"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": (low, high),
            "cpu_ratio": statistics.median(o / d for o, d in zip(of_cpu[name], of_cpu["ddp"], strict=True)),
            "all_seconds": seconds[name],
        }
    return {"rounds": num_rounds, "engines": rows}


def find_missed_steps(result: dict[str, Any]) -> list[str]:
    return [
        f"step of {name}: {row['ratio']:.3f} times ddp's, bar {BARS[name]}"
        for name, row in result["engines"].items()
        if name in BARS and row["ratio"] > BARS[name]
    ]


def print_steps(result: dict[str, Any]) -> None:
    print(f"\nStep, {result['rounds']} rounds in which engines take turns; ratios to ddp's step of the same round")
    print(f"{'':8}{'seconds':>9}{'ratio':>8}{'bar':>7}{'half of them within':>22}{'processor time':>17}")
    for name, row in result["engines"].items():
        within = "{:.3f} to {:.3f}".format(*row["ratio_quartiles"])
        bar = f"{BARS[name]:.2f}" if name in BARS else ""
        print(f"{name:8}{row['seconds']:9.3f}{row['ratio']:8.3f}{bar:>7}{within:>22}{row['cpu_ratio']:17.3f}")
