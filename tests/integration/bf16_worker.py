"""Every engine's first steps in fp32 and bf16, without and with recomputation: `bf16_worker.py OUT.json`.

All in one process group, to spare the start of many. Each run takes the same random images, and reports
{"losses", "norms", "dtypes", "digests"}: of the steps, of all fragments, and of each rank's fragments after the steps.
"""

import gc
import hashlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from gcvit.config import Config
from gcvit.config_file import load_config
from gcvit.loss import soft_target_loss
from gcvit.parallel.build import build_engine
from gcvit.parallel.engine import Fragment
from gcvit.parallel.world import World, join_world
from gcvit.trainer import seed_drop_path

CONFIG = Path(__file__).with_name("golden.yaml")
NUM_STEPS = 3
ENGINES = {
    "ddp": ["engine=ddp"],
    "fsdp": ["engine=fsdp", "fsdp.unit_parameters=10000"],
    "zero1": ["engine=zero", "zero.stage=1"],
    "zero2": ["engine=zero", "zero.stage=2"],
    "zero3": ["engine=zero", "zero.stage=3"],
}


def run_steps(config: Config, world: World, num_micro_steps: int) -> dict[str, Any]:
    engine = build_engine(config, world, num_micro_steps=num_micro_steps)
    engine.module.train()
    generator = torch.Generator().manual_seed(world.rank)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        num_images, size = config.global_batch_size // world.size, config.model.img_size
        images = torch.randn(num_images, 3, size, size, generator=generator).to(world.device)
        targets = torch.randn(num_images, config.model.num_classes, generator=generator).softmax(1).to(world.device)
        loss_sum = torch.zeros((), device=world.device)
        micro_batches = zip(images.chunk(num_micro_steps), targets.chunk(num_micro_steps), strict=True)
        for micro_step, (some_images, some_targets) in enumerate(micro_batches):
            seed_drop_path(config.seed, step, micro_step, world.rank)
            loss = soft_target_loss(engine(some_images), some_targets).sum()
            engine.backward(loss)
            loss_sum += loss.detach()
        result = engine.step(lr=1e-4)
        assert result.applied.item() == 1
        losses.append(world.sum(loss_sum).item() / config.global_batch_size)
        norms.append(result.grad_norm.item())
    kinds = engine.fragments()
    fragments = {f"{kind}.{name}": part for kind, parts in kinds.items() for name, part in parts.items()}
    return {
        "losses": losses,
        "norms": norms,
        "dtypes": sorted(set().union(*world.gather({str(part.data.dtype) for part in fragments.values()}))),
        "digests": world.gather(digest(fragments)),
    }


def digest(fragments: dict[str, Fragment]) -> str:
    found = hashlib.sha256()
    for name, part in sorted(fragments.items()):
        found.update(name.encode() + part.data.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def run_all(world: World) -> dict[str, Any]:
    report = {}
    for name, precision, mode in itertools.product(ENGINES, ("fp32", "bf16"), ("none", "full")):
        overrides = [*ENGINES[name], f"precision={precision}", f"activation_checkpointing={mode}"]
        config, _ = load_config(CONFIG, overrides)
        # ZeRO-1 is refused in bf16 with more than one micro-step.
        report[f"{name} {precision} {mode}"] = run_steps(config, world, num_micro_steps=1 if name == "zero1" else 2)
        gc.collect()  # engines hold themselves in circles
    return report


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join_world() as world:
        report = run_all(world)
        if world.is_first:
            Path(sys.argv[1]).write_text(json.dumps(report))
