"""Is the memory that `train.py --plan` predicts the memory that a training takes?

`python -m benchmarks.plan [--quick] [--json FILE] [--check]`

A grid of variants, recomputation and engines, each trained for two updates with 8 images or more on each rank, by the
engine and the EMA as a run has them. Measured, by other means than the prediction's: on a CPU the peak of all that
PyTorch's allocator gave out, as its profiler saw it, in processes that exchange by gloo; on a GPU, where there is one,
`max_memory_allocated`, in one process. The bar: no case is more than 10 % off. The worst and the median are printed.

On a CPU a freed tensor is missed where one of gloo's threads was the last to hold it, so each exchange is given a
millisecond to let go.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.command import conclude, make_parser

ROOT = Path(__file__).parents[1]
BAR = 0.10
MODES = ("none", "selective", "blocks", "full")
ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
NUM_STEPS = 2  # ZeRO-3 sends ahead from the second one on


@dataclass(frozen=True)
class Case:
    """Describe one training: a point of the grid."""

    variant: str
    img_size: int
    engine: str
    mode: str
    batch: int = 8
    micro_steps: int = 1
    precision: str = "fp32"
    world_size: int = 2

    def __str__(self) -> str:
        accumulates = f" x {self.micro_steps}" if self.micro_steps > 1 else ""
        return f"{self.variant} {self.img_size} {self.precision} {self.engine} {self.mode} {self.batch}{accumulates}"


def grid(quick: bool, on_gpu: bool) -> list[Case]:
    if on_gpu:
        sizes = (("gc_vit_base", 224, 32),) if quick else (("gc_vit_base", 224, 64), ("gc_vit_large", 224, 32))
        common: dict[str, Any] = {"precision": "bf16", "world_size": 1}
        return [Case(v, s, e, m, b, **common) for v, s, b in sizes for e in ENGINES for m in MODES]
    small = ("gc_vit_xxtiny", 64)
    if quick:
        return [Case(*small, engine, mode) for engine in ENGINES for mode in ("none", "full")]
    variants = (("gc_vit_xxtiny", 224), ("gc_vit_tiny", 128), ("gc_vit_base", 96))
    return [
        *(Case(*variant, engine, mode) for variant in variants for engine in ENGINES for mode in MODES),
        *(Case(*small, engine, "none", micro_steps=3) for engine in ENGINES),
        *(Case(*small, engine, "none", micro_steps=2, precision="bf16") for engine in ENGINES),
        *(Case(*small, "hsdp", mode, world_size=4) for mode in MODES),
    ]


def make_config(case: Case) -> Any:
    from gcvit.config.schema import Config, EmaConfig, FsdpConfig, ModelConfig, OptimConfig, ScheduleConfig, ZeroConfig

    is_zero = case.engine.startswith("zero")
    return Config(
        tag="plan",
        global_batch_size=case.batch * case.micro_steps * case.world_size,
        engine="zero" if is_zero else "fsdp" if case.engine == "hsdp" else case.engine,
        fsdp=FsdpConfig(shard_size=2) if case.engine == "hsdp" else None,
        zero=ZeroConfig.model_validate({"stage": int(case.engine[-1])}) if is_zero else None,
        precision=case.precision,
        activation_checkpointing=case.mode,
        model=ModelConfig(name=case.variant, img_size=case.img_size),
        optim=OptimConfig(lr=1e-5),
        schedule=ScheduleConfig(cosine="100 steps"),
        ema=EmaConfig(half_life="100 steps"),
    )


# ---- predicted -----------------------------------------------------------------------------------


def predict(cases: list[Case], on_gpu: bool) -> Iterator[dict[str, Any]]:
    from gcvit.planning.memory_predictor import Forecast

    forecasts: dict[tuple[str, int], Forecast] = {}
    for case in cases:
        config = make_config(case)
        key = case.variant, case.img_size
        forecast = forecasts.setdefault(key, Forecast(config, on_gpu=on_gpu))
        memory = forecast.predict(config, case.world_size, case.batch)
        yield {"predicted_bytes": memory.peak, "held_bytes": sum(memory.held.values()), "moment": memory.moment}


# ---- measured ------------------------------------------------------------------------------------


def measure(cases: list[Case]) -> dict[str, int]:
    """Measure the peak of the fullest rank by case, each group of cases in processes of its own."""
    found: dict[str, int] = {}
    groups = defaultdict(list)
    for case in cases:
        groups[case.variant, case.img_size, case.engine, case.world_size].append(case)
    for (*_, world_size), group in groups.items():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
        command += ["-m", "benchmarks.plan", "--measure", json.dumps([asdict(case) for case in group])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        lines = (line for line in done.stdout.splitlines() if line.startswith("{"))
        found |= {name: num_bytes for line in lines for name, num_bytes in json.loads(line).items()}
    return found


def measure_here(cases: list[Case]) -> None:
    """Train in a process of `measure`, and print the peak from rank 0."""
    from gcvit.runtime.distributed import join_world

    torch.set_num_threads(1)
    wait = dist.Work.wait

    def wait_and_let_go(work: Any, *args: Any, **kwargs: Any) -> Any:
        answer = wait(work, *args, **kwargs)
        time.sleep(0.001)
        return answer

    with join_world() as world:
        if world.device.type == "cpu":
            dist.Work.wait = wait_and_let_go  # type: ignore[method-assign]
        for case in cases:
            peak = peak_on_gpu(case, world) if world.device.type == "cuda" else peak_on_cpu(case, world)
            gc.collect()
            peaks = world.gather(peak)
            if world.is_rank0:
                print(json.dumps({str(case): max(peaks)}), flush=True)


def peak_on_gpu(case: Case, world: Any) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train(case, world)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(case: Case, world: Any) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(case, world)
    results: Any = profiler.profiler
    changes = [(e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for _, num_bytes in sorted(changes):
        total += num_bytes
        peak = max(peak, total)
    return peak


def train(case: Case, world: Any) -> None:
    """Use memory as a run does: build, and per update do the micro-steps, the update and the EMA's."""
    from gcvit.optim.adamw import MODEL
    from gcvit.optim.loss import soft_target_loss
    from gcvit.parallel.build import build_engine
    from gcvit.training.ema import Ema
    from gcvit.training.trainer import seed_drop_path

    config = make_config(case)
    engine = build_engine(config, world, num_micro_steps=case.micro_steps)
    ema = Ema(engine.fragments()[MODEL], half_life_samples=1e3, global_batch_size=config.global_batch_size)
    engine.module.train()
    for step in range(NUM_STEPS):
        for micro_step in range(case.micro_steps):
            images = torch.randn(case.batch, 3, case.img_size, case.img_size, device=world.device)
            targets = torch.rand(case.batch, config.model.num_classes, device=world.device)
            seed_drop_path(0, step, micro_step, world.rank)
            engine.backward(soft_target_loss(engine(images), targets).sum())
        engine.step(1e-5)
        ema.update()


# ---- side by side --------------------------------------------------------------------------------


def compare(quick: bool) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    cases = grid(quick, on_gpu)
    measured = measure(cases)
    rows = [
        {"case": str(case), **asdict(case), **row, "measured_bytes": measured[str(case)]}
        for case, row in zip(cases, predict(cases, on_gpu), strict=True)
    ]
    for row in rows:
        row["error"] = row["predicted_bytes"] / row["measured_bytes"] - 1
    errors = [abs(row["error"]) for row in rows]
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    return {"device": device, "rows": rows, "worst": max(errors), "median": statistics.median(errors)}


def print_table(result: dict[str, Any]) -> None:
    print(f"peak of a training on {result['device']}, MB\n{'':58}{'measured':>10}{'predicted':>11}{'error':>9}")
    for row in result["rows"]:
        measured, predicted = row["measured_bytes"] / 1e6, row["predicted_bytes"] / 1e6
        print(f"{row['case']:58}{measured:10,.1f}{predicted:11,.1f}{row['error']:+9.1%}  {row['moment']}")
    print(f"{len(result['rows'])} cases, worst {result['worst']:.1%}, median {result['median']:.1%}, bar {BAR:.0%}")


def main() -> None:
    parser = make_parser("plan", __doc__, "ten cases of small images")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure_here([Case(**case) for case in json.loads(args.measure)])
        return
    result = compare(args.quick)
    print_table(result)
    missed = [f"{row['case']}: {row['error']:+.1%}" for row in result["rows"] if abs(row["error"]) > BAR]
    conclude(result, missed, args)


if __name__ == "__main__":
    main()
