"""Describe hosts, devices, versions and the FLOPs of an image, for the "start" row of the metrics."""

import importlib.metadata
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch

import gcvit
from gcvit.config.schema import Config
from gcvit.model.flops import TRAINING_PASSES, count_forward_flops
from gcvit.model.from_config import build_model
from gcvit.runtime.distributed import World
from gcvit.runtime.gpu_specs import find_device

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg", "deepspeed")


def describe_environment(config: Config, world: World, *, micro_steps: int) -> dict[str, Any]:
    """Return the row without the samples consumed; every rank calls it. `docs/metrics.md` lists its keys."""
    hosts = world.gather(socket.gethostname())
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else _cpu_name()
    known = find_device(device) if world.device.type == "cuda" else None
    with torch.device("meta"):
        # The counted products are the same with every attention kernel, but some kernels cannot run on meta.
        model = build_model(config.model.model_copy(update={"attention": "reference"}))
    return {
        "world_size": world.size,
        "hosts": sorted(set(hosts), key=hosts.index),
        "device": device,
        "num_devices": world.size,
        "engine": config.engine,
        "precision": config.precision,
        "global_batch_size": config.global_batch_size,
        "micro_batch_size": config.trainer.resolved_micro_batch_size or -(-config.global_batch_size // world.size),
        "accumulation": micro_steps,
        "versions": {"gcvit": gcvit.__version__, "python": platform.python_version(), **_package_versions()},
        "commit": _commit(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_flops_per_image": TRAINING_PASSES * count_forward_flops(model, config.model.img_size),
        "peak_flops": known.peaks.get(config.precision) if known else None,
    }


def _package_versions() -> dict[str, str]:
    there = {}
    for name in _PACKAGES:
        try:
            there[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return there


def _commit() -> str | None:
    """Return the commit of this working tree, with "+" if files differ; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True, env=quiet
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
