"""Engine zero, side by side with and without what may change no number: `zero_worker.py OUT.json`.

All in one process group, to spare the start of many. Each run takes the same random images, 2 micro-steps each step,
and in step 1 the last rank's loss is not a number. It reports {"losses", "norms", "applied", "updates", "scales",
"held", "computed", "average"}: of the steps; then after each step, by rank, the SHA-256 of all fragments and of
the logits; and that of the EMA's logits after the last. Of fp16 null, where this machine has none.
"""

import gc
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from gcvit.config.load import load_config
from gcvit.config.schema import Config
from gcvit.optim.adamw import MODEL
from gcvit.optim.loss import soft_target_loss
from gcvit.parallel.build import build_engine
from gcvit.parallel.engine import Engine
from gcvit.runtime.distributed import World
from gcvit.training.ema import Ema
from tests.helpers.engine_steps import digest, draw_micro_batches, report_to_file

CONFIG = Path(__file__).parents[1] / "helpers/golden.yaml"
NUM_STEPS, BAD_STEP = 3, 1
ON_HOST = "zero.offload_optimizer=cpu"
# Offloaded, the norm of all gradients may be added up in another order: clipping by it would differ in the last bit.
_PLAIN = ["optim.clip_norm=null"]
ZERO1, ZERO2, ZERO3 = ([*_PLAIN, f"zero.stage={stage}"] for stage in (1, 2, 3))
ZERO3_ON_HOST = [*ZERO3, ON_HOST, "zero.offload_parameters=cpu"]
RUNS = {
    "zero1 fp32": ZERO1,
    "zero2 fp32": ZERO2,
    "zero3 fp32": ZERO3,
    "zero1 bf16": [*ZERO1, "precision=bf16"],
    "zero2 bf16": [*ZERO2, "precision=bf16"],
    "zero3 bf16": [*ZERO3, "precision=bf16"],
    "zero1 fp16": [*ZERO1, "precision=fp16"],
    "zero2 fp16": [*ZERO2, "precision=fp16"],
    "zero3 fp16": [*ZERO3, "precision=fp16"],
    "zero1 fp32 clipped": ["zero.stage=1"],
    "zero2 fp32 clipped": ["zero.stage=2"],
    "zero3 fp32 clipped": ["zero.stage=3"],
    "zero1 fp32 offloaded": [*ZERO1, ON_HOST],
    "zero2 fp32 offloaded": [*ZERO2, ON_HOST],
    "zero3 fp32 offloaded": ZERO3_ON_HOST,
    "zero1 bf16 offloaded": [*ZERO1, ON_HOST, "precision=bf16"],
    "zero2 bf16 offloaded": [*ZERO2, ON_HOST, "precision=bf16"],
    "zero3 bf16 offloaded": [*ZERO3_ON_HOST, "precision=bf16"],
    "zero2 fp16 offloaded": [*ZERO2, ON_HOST, "precision=fp16"],
    "zero3 fp16 offloaded": [*ZERO3_ON_HOST, "precision=fp16"],
    # Smaller messages, and gathered weights that are kept, are another way to the same numbers.
    "zero2 fp32 extra": [*ZERO2, "zero.extra={zero_optimization: {reduce_bucket_size: 5000}}"],
    "zero3 fp32 extra": [*ZERO3, "zero.extra={zero_optimization: {stage3_max_reuse_distance: 1000000}}"],
    "zero2 bf16 extra": [*ZERO2, "precision=bf16", "zero.extra={zero_optimization: {reduce_scatter: true}}"],
}


def run_steps(config: Config, world: World, num_micro_steps: int) -> dict[str, Any]:
    engine = build_engine(config, world, num_micro_steps=num_micro_steps)
    torch.manual_seed(0)
    ema = Ema(engine.fragments()[MODEL], half_life_samples=64, global_batch_size=config.global_batch_size)
    generator = torch.Generator().manual_seed(world.rank)
    probe = torch.randn(2, 3, config.model.img_size, config.model.img_size).to(world.device)
    report: dict[str, Any] = {
        name: [] for name in ("losses", "norms", "applied", "updates", "scales", "held", "computed")
    }
    for step in range(NUM_STEPS):
        engine.module.train()
        loss_sum = torch.zeros((), device=world.device)
        for images, targets in draw_micro_batches(config, world, generator, step, num_micro_steps):
            loss = soft_target_loss(engine(images), targets).sum()
            loss_sum += loss.detach()
            bad = step == BAD_STEP and world.rank == world.size - 1
            engine.backward(loss * float("nan") if bad else loss)
        result = engine.step(lr=1e-3)
        if step != BAD_STEP:
            ema.update()
        report["losses"].append(world.sum(loss_sum).item() / config.global_batch_size)
        report["norms"].append(result.grad_norm.item() if result.applied.item() else None)
        report["applied"].append(world.gather(result.applied.item()))
        report["updates"].append(world.gather(engine.counters().updates))
        report["scales"].append(world.gather(engine.counters().loss_scale))
        report["held"].append(world.gather(digest(held(engine))))
        report["computed"].append(world.gather(digest([logits_of(engine, probe)])))
    with ema.swapped_in(engine):
        report["average"] = world.gather(digest([logits_of(engine, probe)]))
    return report


def held(engine: Engine) -> list[Tensor]:
    return [part.data for kind, parts in engine.fragments().items() for _, part in sorted(parts.items())]


@torch.no_grad()
def logits_of(engine: Engine, images: Tensor) -> Tensor:
    engine.module.eval()
    return engine(images)


def run_all(world: World) -> dict[str, Any]:
    report: dict[str, Any] = {}
    linear = torch.nn.functional.linear
    for name, overrides in RUNS.items():
        if "fp16" in name and not get_accelerator().is_fp16_supported():
            report[name] = None
            continue
        config, _ = load_config(CONFIG, ["engine=zero", "model.drop_path=0.2", *overrides])
        report[name] = run_steps(config, world, num_micro_steps=2)
        gc.collect()  # engines hold themselves in circles
    report["linear is torch's"] = torch.nn.functional.linear is linear
    return report


if __name__ == "__main__":
    report_to_file(run_all)
