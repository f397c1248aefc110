"""Engines ddp and fsdp side by side in one process group: `fsdp_worker.py OUT.json`.

Each run takes the same random images, 2 micro-steps each step, and reports {"losses", "norms", "scales", "parts",
"digests", "traffic"}: of the steps; then of each rank [name, start, numel, whole, replica, number of replicas] of all
fragments, and their SHA-256; and of each micro-step the collectives that its backward sent.
"""

import gc
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor.debug import CommDebugMode

from gcvit.config import Config
from gcvit.config_file import load_config
from gcvit.errors import UserError
from gcvit.loss import soft_target_loss
from gcvit.parallel.build import build_engine
from gcvit.parallel.world import World, join_world
from gcvit.trainer import seed_drop_path

CONFIG = Path(__file__).with_name("golden.yaml")
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
        num_images, size = config.global_batch_size // world.size, config.model.img_size
        images = torch.randn(num_images, 3, size, size, generator=generator).to(world.device)
        targets = torch.randn(num_images, config.model.num_classes, generator=generator).softmax(1).to(world.device)
        loss_sum = torch.zeros((), device=world.device)
        micro_batches = zip(images.chunk(NUM_MICRO_STEPS), targets.chunk(NUM_MICRO_STEPS), strict=True)
        for micro_step, (some_images, some_targets) in enumerate(micro_batches):
            seed_drop_path(config.seed, step, micro_step, world.rank)
            loss = soft_target_loss(engine(some_images), some_targets).sum()
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
    digest, parts = hashlib.sha256(), []
    for kind, fragments in sorted(engine.fragments().items()):
        for name, part in sorted(fragments.items()):
            digest.update(part.data.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            place = (part.start, part.data.numel(), part.shape.numel(), part.replica, part.num_replicas)
            parts.append([f"{kind}.{name}", *place])
    return {
        "losses": losses,
        "norms": norms,
        "scales": scales,
        "parts": world.gather(parts),
        "digests": world.gather(digest.hexdigest()),
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
    torch.set_num_threads(1)
    with join_world() as world:
        report = run_all(world)
        if world.is_first:
            Path(sys.argv[1]).write_text(json.dumps(report))
