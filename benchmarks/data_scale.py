"""Measure the loader on a large data set: memory, epochs' ends, deep resumes, planning. Used by `benchmarks.data`."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from gcvit.config.schema import Config
from gcvit.data.batch_plan import BatchPlan
from gcvit.data.epoch_order import EpochOrder
from gcvit.data.loader import train_stream
from gcvit.data.manifest import Shard, read_manifest, write_manifest
from gcvit.data.source import Source, open_source

IMAGENET, IMAGENET_21K = 1_280_000, 14_200_000
WORLD_SIZE = 32  # as the recipe's; the first of these ranks is measured
STEP_SECONDS = 0.25  # of a training step, between batches: more than two loader processes need for one


def resident_mb(pid: int | str = "self", field: str = "VmRSS") -> float:
    """Read the resident memory of a process in MB; the field `VmHWM` is its highest so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(field))


def tree_mb(pid: int) -> float:
    """Sum the resident memory of a process and all below it in MB; shared pages count for each."""
    children = [
        child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return resident_mb(pid) + sum(tree_mb(int(child)) for child in children)


def measure_memory(source: Source, config: Config, num_epochs: int) -> dict[str, Any]:
    """Measure the RSS of this process and its loader processes after each epoch, and its growth.

    The growth is from the median of epochs 2-6 to that of the last 5.
    """
    batch_plan = BatchPlan.from_config(config, world_size=1, micro_batch_size=None)
    stream = train_stream(source, config, batch_plan, start_step=0, rank=0, pin_memory=False)
    sizes = []
    for _ in range(num_epochs):
        for _ in range(source.num_samples // config.global_batch_size):
            next(stream)
        sizes.append(tree_mb(os.getpid()))
    growth = statistics.median(sizes[-5:]) / statistics.median(sizes[1:6])
    print("\nMB after each epoch: " + " ".join(f"{size:.0f}" for size in sizes))
    return {"memory_mb": sizes, "memory_growth": growth}


def make_large(split: Path, folder: Path) -> None:
    """Write a manifest of as many samples as ImageNet has: one shard of `split` under many names."""
    manifest = read_manifest(split)
    shard = manifest.shards[0]
    num_shards = -(-IMAGENET // shard.num_samples)
    (folder / "train").mkdir(parents=True)
    shards = []
    for number in range(num_shards):
        name = f"train-{number:06d}.tar"
        os.link(split / shard.name, folder / "train" / name)
        shards.append(Shard(name, shard.num_samples, shard.num_bytes, shard.sha256))
    columns = {
        name: np.tile(getattr(manifest, name)[: shard.num_samples], num_shards)
        for name in ("offset", "length", "label", "crc32")
    }
    write_manifest(folder / "train", "train", manifest.classes, shards, columns)


def measure_resume(folder: Path, config: Config) -> dict[str, float]:
    """Measure the seconds from opening a set of ImageNet's size to the first batch of a step far inside.

    There are no loader processes, since the time of their start does not depend on the step.
    """
    config = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": 0})})
    seconds = []
    for step in (123_456, 7 * IMAGENET // config.global_batch_size - 1, 99_999):
        start = time.perf_counter()
        source = open_source(folder, "train")
        next(
            train_stream(
                source,
                config,
                BatchPlan.from_config(config, WORLD_SIZE, micro_batch_size=None),
                start_step=step,
                rank=0,
                pin_memory=False,
            )
        )
        seconds.append(time.perf_counter() - start)
    return {"resume_s": statistics.median(seconds)}


def measure_reads(folder: Path, config: Config) -> dict[str, float]:
    """Measure the bytes that a rank of two reads in an epoch, its share of the tars' bytes, and the MB of a read.

    Only this process reads, and calls of `os.preadv` are counted, by which chunks of samples are read.
    """
    config = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": 0})})
    sizes: list[int] = []
    preadv = os.preadv

    def count(*place: Any) -> int:
        sizes.append(preadv(*place))
        return sizes[-1]

    source = open_source(folder, "train")
    batch_plan = BatchPlan.from_config(config, world_size=2, micro_batch_size=None)
    stream = train_stream(source, config, batch_plan, start_step=0, rank=0, pin_memory=False)
    with mock.patch.object(os, "preadv", count):
        for _ in range(source.num_samples // config.global_batch_size):
            next(stream)
    share = sum(path.stat().st_size for path in folder.glob("train/*.tar")) / 2
    return {"read_share": sum(sizes) / share, "read_mb": sum(sizes) / len(sizes) / 1e6}


def measure_boundary(folder: Path, config: Config) -> dict[str, float]:
    """Measure the milliseconds that a rank waits for the first batch of an epoch, and its longest wait around that.

    The rank trains for `STEP_SECONDS` between batches.
    """
    source = open_source(folder, "train")
    last_step = source.num_samples // config.global_batch_size  # the first that holds samples of the second epoch
    num_around = 2 * config.data.num_workers * config.data.prefetch_batches
    stream = train_stream(
        source,
        config,
        BatchPlan.from_config(config, WORLD_SIZE, micro_batch_size=None),
        start_step=last_step - 2 * num_around,
        rank=0,
        pin_memory=False,
    )
    waits = []
    for _ in range(3 * num_around):
        time.sleep(STEP_SECONDS)
        start = time.perf_counter()
        next(stream)
        waits.append(1000 * (time.perf_counter() - start))
    around = waits[num_around:]
    print(f"waits around an epoch's end: median {statistics.median(around):.1f} ms, longest {max(around):.1f} ms")
    return {"epoch_boundary_ms": waits[2 * num_around], "epoch_around_ms": max(around)}


def measure_planning() -> dict[str, float]:
    """Measure the seconds and MB of planning one epoch of ImageNet-21K's size, in a process of its own.

    It plans all lanes, as a single rank would; each of several ranks plans its share.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "length.npy"
        rng = np.random.default_rng(0)
        np.save(path, rng.integers(20_000, 200_000, IMAGENET_21K, dtype=np.uint32))
        output = subprocess.run(
            [sys.executable, "-m", "benchmarks.data_scale", str(path)], check=True, stdout=subprocess.PIPE
        ).stdout
    return dict(json.loads(output))


def plan_large(path: Path) -> dict[str, float]:
    length = np.load(path, mmap_mode="r")
    first = np.arange(0, len(length) + 1, 1000)
    before = resident_mb()
    start = time.process_time()  # one thread's, so that it is wall time on a core of its own
    order = EpochOrder(first, length, seed=0, epoch=1, lanes=1024, chunk_bytes=2_000_000, shuffle_chunks=4)
    order.plan(np.arange(order.lanes))
    seconds = time.process_time() - start
    positions = np.arange(0, IMAGENET_21K, 1000)
    assert len(np.unique(order.lookup(positions).samples)) == len(positions)
    return {"planning_s": seconds, "planning_mb": resident_mb(field="VmHWM") - before}


if __name__ == "__main__":
    print(json.dumps(plan_large(Path(sys.argv[1]))))
