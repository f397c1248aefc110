"""Measure a model's latency and images per second by batch size: `evaluate.py --benchmark`."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gcvit.checkpoint import weights_source
from gcvit.checkpoint.weights_source import Candidate
from gcvit.errors import UserError
from gcvit.evaluation.tta import PRECISIONS, Options, Views
from gcvit.runtime.distributed import World

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
PERCENTILES = (50, 90, 99)
_WARM_UP_SECONDS, _SECONDS = 0.5, 3.0  # of each batch size, at least
_MIN_PASSES, _MAX_PASSES = 10, 1000


def benchmark(weights: Candidate, options: Options, batch_sizes: Sequence[int] | None, world: World) -> None:
    """Print, for each batch size, percentiles of a pass in milliseconds and images per second, as JSON and a table.

    Images are random and on the device already; a pass ends when the device is done. With several sizes it is a pass at
    each.

    Raises:
        UserError: There is more than one process.
    """
    if world.size > 1:
        raise UserError("--benchmark times one device", got=f"{world.size} processes", hint="start one process")
    state, sizes = weights.read(world), options.sizes_of(weights.model)
    modules = [weights_source.load(weights, state, size).to(world.device) for size in sizes]
    model = Views(modules, dtype=PRECISIONS[options.precision])
    rows = []
    for batch_size in batch_sizes or BATCH_SIZES:
        try:
            images = [torch.randn(batch_size, 3, size, size, device=world.device) for size in sizes]
            row = measure(lambda images=images: model(*images), batch_size, world.device, _SECONDS)  # type: ignore[misc]
        except torch.OutOfMemoryError:
            print(f"batch size {batch_size} does not fit the device's memory", file=sys.stderr, flush=True)
            break
        rows.append(row)
        print(json.dumps({"img_size": list(sizes), "precision": options.precision, **row}), flush=True)
    print(_as_table(rows), file=sys.stderr, flush=True)


@torch.inference_mode()
def measure(run: Callable[[], object], batch_size: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """Time single passes after a warm-up: {batch_size, num_passes, p50_ms, ..., images_per_second}."""

    def time_pass() -> float:
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    end = time.perf_counter() + min(_WARM_UP_SECONDS, seconds)
    while time_pass() and time.perf_counter() < end:  # one at least, in which kernels are compiled
        pass
    times: list[float] = []
    while len(times) < _MIN_PASSES or (sum(times) < seconds and len(times) < _MAX_PASSES):
        times.append(time_pass())
    values = np.percentile(times, PERCENTILES) * 1000
    return {
        "batch_size": batch_size,
        "num_passes": len(times),
        **{f"p{percent}_ms": float(value) for percent, value in zip(PERCENTILES, values, strict=True)},
        "images_per_second": batch_size * len(times) / sum(times),
    }


def _as_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["batch   p50 ms   p90 ms   p99 ms     img/s"]
    lines += [
        f"{row['batch_size']:5} {row['p50_ms']:8.2f} {row['p90_ms']:8.2f} {row['p99_ms']:8.2f} "
        f"{row['images_per_second']:9.1f}"
        for row in rows
    ]
    return "\n".join(lines)
