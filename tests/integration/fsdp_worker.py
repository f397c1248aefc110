"""Engines ddp and fsdp side by side in one process group: `fsdp_worker.py OUT.json`.

Each run takes the same random images, 2 micro-steps each step, and reports {"losses", "norms", "scales", "parts",
"digests", "traffic"}: of the steps; then of each rank [name, start, numel, whole, replica, number of replicas] of all
fragments, and their SHA-256; and of each micro-step the collectives that its backward sent.
"""

import gc
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor.debug import CommDebugMode

from gcvit.config.load import load_config
from gcvit.config.schema import Config
from gcvit.errors import UserError
from gcvit.optim.loss import soft_target_loss
from gcvit.parallel.build import build_engine
from gcvit.runtime.distributed import World
from tests.helpers.engine_steps import digest, draw_micro_batches, report_to_file

CONFIG = Path(__file__).parents[1] / "helpers/golden.yaml"
NUM_STEPS, NUM_MICRO_STEPS = 3, 2
FSDP = ["engine=fsdp", "fsdp.unit_parameters=10000", "model.drop_path=0.2"]
RUNS = {
    "ddp": ["engine=ddp", "model.drop_path=0.2"],
    "fsdp": FSDP,
    "hsdp": [*FSDP, "fsdp.shard_size=2"],
    "hsdp keeping": [*FSDP, "fsdp.shard_size=2", "fsdp.reshard_after_forward=false"],
    "fsdp offloaded": [*FSDP, "fsdp.shard_size=4", "fsdp.cpu_offload=true"],
    "hsdp offloaded": [*FSDP, "fsdp.shard_size=2", "fsdp.cpu_offload=true"],
    "fsdp summing in bf16": [*FSDP, "fsdp.reduce_dtype=bf16"],
    "ddp fp16": ["engine=ddp", "model.drop_path=0.2", "precision=fp16"],
    "hsdp fp16": [*FSDP, "precision=fp16", "fsdp.shard_size=2"],
}


def run_steps(config: Config, world: World) -> dict[str, Any]:
    engine = build_engine(config, world, num_micro_steps=NUM_MICRO_STEPS)
    engine.module.train()
    generator = torch.Generator().manual_seed(world.rank)
    losses, norms, scales, traffic = [], [], [], []
    for step in range(NUM_STEPS):
        loss_sum = torch.zeros((), device=world.device)
        for images, targets in draw_micro_batches(config, world, generator, step, NUM_MICRO_STEPS):
            loss = soft_target_loss(engine(images), targets).sum()
            with CommDebugMode() as sent:
                engine.backward(loss)
            traffic.append({str(kind): count for kind, count in sent.get_comm_counts().items()})
            loss_sum += loss.detach()
        result = engine.step(lr=1e-4)
        assert result.applied.item() == 1
        assert {result.grad_norm.device.type, result.applied.device.type} == {world.device.type}
        losses.append(world.sum(loss_sum).item() / config.global_batch_size)
        norms.append(world.gather(result.grad_norm.item()))
        scales.append(world.gather(engine.counters().loss_scale))
    held, parts = [], []
    for kind, fragments in sorted(engine.fragments().items()):
        for name, part in sorted(fragments.items()):
            held.append(part.data)
            place = (part.start, part.data.numel(), part.shape.numel(), part.replica, part.num_replicas)
            parts.append([f"{kind}.{name}", *place])
    return {
        "losses": losses,
        "norms": norms,
        "scales": scales,
        "parts": world.gather(parts),
        "digests": world.gather(digest(held)),
        "traffic": traffic,
    }


def refusal(world: World) -> str:
    config, _ = load_config(CONFIG, [*FSDP, "fsdp.shard_size=3"])
    try:
        build_engine(config, world, num_micro_steps=1)
    except UserError as error:
        return str(error)
    raise AssertionError("3 divides no 4")


def run_all(world: World) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name, overrides in RUNS.items():
        config, _ = load_config(CONFIG, overrides)
        report[name] = run_steps(config, world)
        gc.collect()  # engines hold themselves in circles
    report["refusal"] = refusal(world)
    return report


if __name__ == "__main__":
    report_to_file(run_all)
