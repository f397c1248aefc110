"""What engines hold: activations by mode of checkpointing, and memory at the start.

`python -m benchmarks.engines_memory [--quick] [--json FILE] [--check]`

    activations   gc_vit_base at 224, fp32 on a CPU (2 images, one thread), bf16 on a GPU (32 images): bytes, weights
                  apart, that are alive after a training forward pass, and the time of forward and backward (on a CPU
                  what the process was given of it): medians, and medians of ratios to "none", of rounds in which all
                  modes take turns. Bytes are those of distinct storages that the dispatcher has seen (on a GPU: of the
                  allocator, with the peak until after backward)
    start         GC ViT-L, fp32, two processes on a CPU: the most by which a process grows while it builds its engine,
                  of which it has built a tiny one before, against what the engine has to hold when it is built

A process's growth is that of its resident set, with an allocator that returns every large tensor to the system.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import conclude, make_parser

ROOT = Path(__file__).parents[1]
MODES = ("none", "selective", "blocks", "full")
# Times less memory at least, and time at most, as multiples of "none".
ACTIVATION_BARS = {"selective": (1.7, None), "blocks": (3.5, None), "full": (10.0, 1.35)}
ENGINES = {
    "ddp": ["engine=ddp"],
    "fsdp": ["engine=fsdp"],
    "zero1": ["engine=zero", "zero.stage=1"],
    "zero2": ["engine=zero", "zero.stage=2"],
    "zero3": ["engine=zero", "zero.stage=3"],
}
WORLD_SIZE = 2
MARGIN = 0.1  # beyond the theory and one block (and what gloo takes), as a share of the theory


# ---- activations ---------------------------------------------------------------------------------


def measure_activations(quick: bool) -> dict[str, Any]:
    """Measure bytes and seconds by mode, with `less` and `time` as multiples of "none"; name a mode better in both."""
    from gcvit.model import create_model
    from gcvit.parallel.activation_checkpointing import recompute_parts

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    weights = create_model("gc_vit_base", num_classes=1000, img_size=224).to(device, dtype).state_dict()
    models = {}
    for mode in MODES:
        with torch.device("meta"):
            models[mode] = create_model("gc_vit_base", num_classes=1000, img_size=224, drop_path_rate=0.5).train()
        models[mode].load_state_dict(weights, assign=True)
        recompute_parts(models[mode], mode)
    images = torch.randn(32 if on_gpu else 2, 3, 224, 224, device=device, dtype=dtype)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn in range(1 + (3 if quick else 15)):
        for mode in MODES[turn % len(MODES) :] + MODES[: turn % len(MODES)]:
            taken = time_step(models[mode], images)
            if turn:  # the first one only warms up
                seconds[mode].append(taken)
    rows: dict[str, Any] = {}
    for mode in MODES:
        rows[mode] = measure_bytes(models[mode], images) | {
            "seconds": statistics.median(seconds[mode]),
            "time": statistics.median(a / b for a, b in zip(seconds[mode], seconds["none"], strict=True)),
        }
        rows[mode]["less"] = rows["none"]["bytes"] / rows[mode]["bytes"]
    for row in rows.values():
        better = (m for m, r in rows.items() if r["less"] >= row["less"] and r["time"] <= row["time"] and r is not row)
        row["dominated_by"] = next(better, None)
    return {"device": str(device), "images": len(images), "rounds": len(seconds["none"]), "modes": rows}


def time_step(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Measure the seconds of forward and backward, on a CPU of its one thread's work; drop the gradients."""
    clock = time.perf_counter if images.device.type == "cuda" else time.process_time
    synchronize(images.device)
    start = clock()
    model(images).float().square().mean().backward()
    synchronize(images.device)
    seconds = clock() - start
    for p in model.parameters():
        p.grad = None
    return seconds


def measure_bytes(model: torch.nn.Module, images: torch.Tensor) -> dict[str, int]:
    from gcvit.parallel.activation_budget import StorageTracker

    if images.device.type == "cpu":
        with StorageTracker(model.parameters()) as tracker:
            _logits = model(images)
            return {"bytes": tracker.bytes_alive()}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - images.nbytes
    logits = model(images)
    num_bytes = torch.cuda.memory_allocated() - before
    logits.float().square().mean().backward()
    del logits
    for p in model.parameters():
        p.grad = None
    return {"bytes": num_bytes, "peak_bytes": torch.cuda.max_memory_allocated() - before}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def missed_activations(result: dict[str, Any]) -> list[str]:
    missed = []
    for mode, (less, slower) in ACTIVATION_BARS.items():
        row = result["modes"][mode]
        if row["less"] < less:
            missed.append(f"{mode}: {row['less']:.2f} times less, bar {less}")
        if slower is not None and row["time"] > slower:
            missed.append(f"{mode}: {row['time']:.2f} times the time, bar {slower}")
    return missed


def print_activations(result: dict[str, Any]) -> None:
    print(f"{result['images']} images on {result['device']}, {result['rounds']} rounds")
    print(f"{'':10}{'MB':>9}{'less':>7}{'bar':>6}{'seconds':>9}{'time':>7}{'bar':>6}")
    for mode, row in result["modes"].items():
        less, slower = (f"{bar}" if bar else "" for bar in ACTIVATION_BARS.get(mode, (None, None)))
        note = f"   {row['dominated_by']} is better in both" if row["dominated_by"] else ""
        print(
            f"{mode:10}{row['bytes'] / 1e6:9,.1f}{row['less']:7.2f}{less:>6}"
            f"{row['seconds']:9.3f}{row['time']:7.2f}{slower:>6}{note}"
        )


# ---- the start -----------------------------------------------------------------------------------


def measure_startup(quick: bool, model: str | None = None) -> dict[str, Any]:
    """Measure the bytes that an engine holds after its build and at most during it, beside the theory, by engine."""
    name = model or ("gc_vit_small" if quick else "gc_vit_large")
    return {"model": name, "world_size": WORLD_SIZE, "engines": {engine: start(engine, name) for engine in ENGINES}}


def start(engine: str, model: str) -> dict[str, Any]:
    """Build an engine in processes of its own, and return the largest growth of a rank, the theory and the bound."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD_SIZE}"]
    command += ["-m", "benchmarks.engines_memory", "--start-of", engine, "--model", model]
    # Beyond a threshold glibc gives memory back at once, and by default it raises that threshold as it goes.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **settings, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    found: dict[str, Any] = json.loads(line)
    theory = held_in_theory(engine, found["weights_bytes"])
    # Stages 1 and 2 gather what they have updated, by gloo into memory of its own, by NCCL in place.
    gathered = found["weights_bytes"] if engine in ("zero1", "zero2") else 0
    allowed = (1 + MARGIN) * theory + found["block_bytes"] + gathered
    return found | {"theory_bytes": theory, "allowed_bytes": allowed}


def held_in_theory(engine: str, weights_bytes: int) -> float:
    """Compute the bytes of a built engine in fp32, with the gradients that are allocated before the first step."""
    share = weights_bytes / WORLD_SIZE
    match engine:
        case "ddp":
            return 4 * weights_bytes  # weights, two moments, gradients in buckets
        case "fsdp":
            return 3 * share  # weights, two moments
        case "zero1" | "zero2":
            return weights_bytes + 3 * share  # weights; masters, two moments
        case "zero3":
            return 5 * share  # weights, masters, two moments, gradients
    raise AssertionError(engine)


def start_here(engine: str, model: str) -> None:
    """Build the engine in a process of `start`, and print its memory from rank 0."""
    from gcvit.config.schema import Config, ModelConfig, OptimConfig, OverridesConfig, ScheduleConfig, ZeroConfig
    from gcvit.model.from_config import build_model
    from gcvit.parallel.build import build_engine
    from gcvit.runtime.distributed import join_world

    torch.set_num_threads(1)
    tiny = OverridesConfig(width=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))

    def configure(shape: ModelConfig) -> Config:
        return Config(
            tag="start",
            global_batch_size=2 * WORLD_SIZE,
            engine="zero" if engine.startswith("zero") else engine,
            zero=ZeroConfig(stage=int(engine[-1])) if engine.startswith("zero") else None,
            precision="fp32",
            model=shape,
            optim=OptimConfig(lr=1e-3),
            schedule=ScheduleConfig(cosine="10 steps"),
        )

    config = configure(ModelConfig(name=model))
    with join_world() as world:
        first = build_engine(configure(ModelConfig(name="gc_vit_xxtiny", overrides=tiny)), world, num_micro_steps=1)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = memory_of_process("VmRSS")
        built = build_engine(config, world, num_micro_steps=1)
        after, peak = memory_of_process("VmRSS") - before, memory_of_process("VmHWM") - before
        del first, built
        with torch.device("meta"):
            whole = build_model(config.model)
        parts = [whole.get_submodule(name) for name in whole.cut_points()]
        found = {
            "weights_bytes": 4 * sum(p.numel() for p in whole.parameters()),
            "block_bytes": 4 * max(sum(p.numel() for p in part.parameters()) for part in parts),
            "held_bytes": max(world.gather(after)),
            "peak_bytes": max(world.gather(peak)),
        }
        if world.is_rank0:
            print(json.dumps(found), flush=True)
        world.barrier()


def memory_of_process(name: str) -> int:
    """Read the memory of this process in bytes from Linux: VmRSS is resident now, VmHWM was the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def missed_startup(result: dict[str, Any]) -> list[str]:
    return [
        f"start of {engine}: {row['peak_bytes'] / 1e6:,.0f} MB, allowed {row['allowed_bytes'] / 1e6:,.0f}"
        for engine, row in result["engines"].items()
        if row["peak_bytes"] > row["allowed_bytes"]
    ]


def print_startup(result: dict[str, Any]) -> None:
    print(f"{result['model']} in fp32, {result['world_size']} processes; MB of the fullest")
    print(f"{'':10}{'theory':>9}{'held':>9}{'most':>9}{'allowed':>9}")
    for engine, row in result["engines"].items():
        cells = (row[f"{kind}_bytes"] / 1e6 for kind in ("theory", "held", "peak", "allowed"))
        print(f"{engine:10}" + "".join(f"{cell:9,.0f}" for cell in cells))


def main() -> None:
    parser = make_parser("engines_memory", __doc__, "3 rounds, and the start of gc_vit_small")
    parser.add_argument("--start-of", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start_of:
        start_here(args.start_of, args.model)
        return
    startup = measure_startup(args.quick)
    print_startup(startup)
    activations = measure_activations(args.quick)
    print_activations(activations)
    missed = missed_startup(startup) + missed_activations(activations)
    conclude({"startup": startup, "activations": activations}, missed, args)


if __name__ == "__main__":
    main()
