"""What does a checkpoint cost the training? `python -m benchmarks.engines_saves [--quick] [--check] [--json FILE]`

GC ViT-T (28 M parameters, with EMA: 0.45 GB of tensors) at 224 pixels, few images a step so that steps are short, on
two processes, by ddp and by fsdp. Cycles of a few steps take turns: in one the first
step ends with a real save, whose write goes on beside the next steps; in the other none does. Each starts when nothing
is being written.

    saving step   its median less that of the first step of the other cycles, in steps; bar: at most 1. The first
                  save, which takes the memory for snapshots, is left out.
    whole cost    the same of whole cycles: it counts also what the writer takes from the steps beside it

On a machine with as many cores as processes the writer works in the training's time; with more, beside it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.command import conclude, make_parser

ROOT = Path(__file__).parents[1]
BARS = {"saving_step": 1.0}  # steps of extra time, at most
ENGINES = ("ddp", "fsdp")  # replicas, which are compared and divided; shards
NUM_PROCESSES = 2
IMAGES_PER_RANK = 2
STEPS_PER_CYCLE = 3


def make_images(root: Path) -> None:
    """Write a data set that a run can start on; its images do not matter."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(4):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")


def measure_engine(name: str, num_cycles: int, folder: Path) -> dict[str, Any] | None:
    """Measure one engine; each of its processes calls this, and rank 0 gets the results."""
    from gcvit.config.load import load_config
    from gcvit.data.source import open_sources
    from gcvit.optim.loss import soft_target_loss
    from gcvit.runtime.distributed import join_world
    from gcvit.training.setup import build_trainer
    from gcvit.training.trainer import log_saves

    torch.set_num_threads(1)
    words = [f"data.dir={folder / 'images'}", f"output_dir={folder}", f"tag={name}", "ema={half_life: 9 steps}"]
    words += ["model.num_classes=4", "data.num_workers=0", "precision=fp32", "schedule.warmup=0 steps"]
    words += [f"global_batch_size={NUM_PROCESSES * IMAGES_PER_RANK}", "augment.mix=null", "trainer.keep_checkpoints=1"]
    config, _ = load_config(ROOT / "configs/gc_vit_tiny.yaml", [f"engine={name}", *words])
    images = torch.randn(IMAGES_PER_RANK, 3, 224, 224)
    targets = torch.full((IMAGES_PER_RANK, 4), 0.25)
    first: dict[bool, list[float]] = {True: [], False: []}
    whole: dict[bool, list[float]] = {True: [], False: []}
    with (
        join_world() as world,
        build_trainer(config, world, open_sources(config.data, config.model.num_classes)) as trainer,
    ):
        num_parameters = sum(p.numel() for p in trainer.engine.module.parameters())

        def step(with_save: bool) -> None:
            trainer.engine.module.train()
            trainer.engine.backward(soft_target_loss(trainer.engine(images), targets).sum())
            trainer.engine.step(1e-5)
            if trainer.ema:
                trainer.ema.update()
            trainer.state.step += 1
            if with_save:
                trainer.save()

        def cycle(with_save: bool) -> tuple[float, float]:
            log_saves(trainer.metrics, trainer.checkpoints.wait())
            world.barrier()
            begin = time.perf_counter()
            step(with_save)
            middle = time.perf_counter()
            for _ in range(STEPS_PER_CYCLE - 1):
                step(False)
            world.barrier()
            return middle - begin, time.perf_counter() - begin

        cycle(False)
        cycle(True)
        for _ in range(num_cycles):
            for with_save in (True, False):
                seconds = cycle(with_save)
                first[with_save].append(seconds[0])
                whole[with_save].append(seconds[1])
        log_saves(trainer.metrics, trainer.checkpoints.wait())
    if not world.is_rank0:
        return None
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    saves = [row for row in rows if row["kind"] == "checkpoint"][1:]
    plain = statistics.median(first[False])
    extra = {
        "saving_step": (statistics.median(first[True]) - plain) / plain,
        "whole_cost": (statistics.median(whole[True]) - statistics.median(whole[False])) / plain,
    }
    medians = {key: statistics.median(row[key] for row in saves) for key in ("stall_seconds", "write_seconds", "bytes")}
    return {"parameters": num_parameters, "saves": len(saves), "step_seconds": plain, **medians, **extra}


def measure_engines(module: str, engines: Sequence[str], *words: str) -> dict[str, Any]:
    """Run the worker of a benchmark's module for each engine, in processes with their own images; return results."""
    results = {}
    for name in engines:
        with tempfile.TemporaryDirectory() as folder:
            make_images(Path(folder) / "images")
            out = Path(folder) / "result.json"
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_PROCESSES}"]
            worker = ["-m", module, "--worker", name, "--json", str(out), *words]
            done = subprocess.run([sys.executable, *launcher, *worker], cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            results[name] = json.loads(out.read_text())
    return results


def measure_saves(quick: bool) -> dict[str, Any]:
    """Measure "saving_step" and "whole_cost" of each engine in steps, with the medians behind them."""
    return measure_engines("benchmarks.engines_saves", ENGINES, "--cycles", "2" if quick else "15")


def find_misses(results: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {bar} {result[bar]:.2f} > {most}"
        for name, result in results.items()
        for bar, most in BARS.items()
        if result[bar] > most
    ]


def print_saves(results: dict[str, Any]) -> None:
    print(f"{'engine':8}{'step':>9}{'stall':>9}{'write':>9}{'saving step':>14}{'whole cost':>13}")
    for name, x in results.items():
        print(
            f"{name:8}{x['step_seconds']:7.2f} s{x['stall_seconds']:7.2f} s{x['write_seconds']:7.2f} s"
            f"{x['saving_step']:+8.2f} steps{x['whole_cost']:+7.2f} steps"
        )


def main() -> None:
    parser = make_parser("engines_saves", __doc__, "few cycles")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--cycles", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        result = measure_engine(arguments.worker, arguments.cycles, arguments.json.parent)
        if result:
            arguments.json.write_text(json.dumps(result))
        return
    results = measure_saves(arguments.quick)
    print_saves(results)
    conclude(results, find_misses(results), arguments)


if __name__ == "__main__":
    main()
