"""Every engine's first steps in fp32 and bf16, without and with recomputation: `bf16_worker.py OUT.json`.

All in one process group, to spare the start of many. Each run takes the same random images, and reports
{"losses", "norms", "dtypes", "digests"}: of the steps, of all fragments, and of each rank's fragments after the steps.
"""

import gc
import itertools
from pathlib import Path
from typing import Any

import torch

from gcvit.config.load import load_config
from gcvit.config.schema import Config
from gcvit.optim.loss import soft_target_loss
from gcvit.parallel.build import build_engine
from gcvit.runtime.distributed import World
from tests.helpers.engine_steps import digest, draw_micro_batches, report_to_file

CONFIG = Path(__file__).parents[1] / "helpers/golden.yaml"
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
        loss_sum = torch.zeros((), device=world.device)
        for images, targets in draw_micro_batches(config, world, generator, step, num_micro_steps):
            loss = soft_target_loss(engine(images), targets).sum()
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
        "digests": world.gather(digest(part.data for _, part in sorted(fragments.items()))),
    }


def run_all(world: World) -> dict[str, Any]:
    report = {}
    for name, precision, mode in itertools.product(ENGINES, ("fp32", "bf16"), ("none", "full")):
        overrides = [*ENGINES[name], f"precision={precision}", f"activation_checkpointing={mode}"]
        config, _ = load_config(CONFIG, overrides)
        report[f"{name} {precision} {mode}"] = run_steps(config, world, num_micro_steps=2)
        gc.collect()  # engines hold themselves in circles
    return report


if __name__ == "__main__":
    report_to_file(run_all)
