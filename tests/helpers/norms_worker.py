"""Compute norms by stage of every engine in one process group: `norms_worker.py OUT.json`.

Each engine takes the same first steps on the same random images, and reports [step, kind, norms by stage]. "truth" has
the norms of a plain model on the whole batch.
"""

import copy
import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gcvit.config.load import load_config
from gcvit.monitoring.norms import Norms
from gcvit.optim.loss import soft_target_loss
from gcvit.parallel.build import build_engine
from gcvit.runtime.distributed import World
from tests.helpers.engine_steps import report_to_file

CONFIG = Path(__file__).with_name("golden.yaml")
STAGES = ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "norm", "head"]
ENGINES = {
    "ddp": ["engine=ddp"],
    "fsdp": ["engine=fsdp", "fsdp.unit_parameters=10000"],
    **{f"zero{stage}": ["engine=zero", f"zero.stage={stage}"] for stage in (1, 2, 3)},
}
NUM_STEPS, NUM_MICRO_STEPS = 2, 2


class Shown(list):
    """Stand in for `MetricLogger`."""

    def log_norms(self, step: int, kind: str, of_stages: dict[str, np.ndarray]) -> None:
        self.append((step, kind, of_stages))


def true_norms(updated: nn.Module, twin: nn.Module) -> dict[str, dict[str, list[float]]]:
    """Compute the norms of the updated parameters, and of the gradients of a twin of the model before the update."""
    norms: dict[str, dict[str, list[float]]] = {"parameter_norms": {}, "gradient_norms": {}}
    for (name, parameter), before in zip(updated.named_parameters(), twin.parameters(), strict=True):
        (stage,) = [stage for stage in STAGES if name.startswith(f"{stage}.")]
        for kind, tensor in (("parameter_norms", parameter), ("gradient_norms", before.grad)):
            norms[kind].setdefault(stage, []).append(tensor.norm().item())
    return norms


def draw(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    return torch.randn(32, 3, 32, 32, generator=random), torch.randn(32, 4, generator=random).softmax(1)


def run_steps(overrides: list[str], world: World) -> dict[str, Any]:
    config, _ = load_config(CONFIG, [*overrides, "optim.lr=1e-3", "optim.clip_norm=0.5"])
    engine = build_engine(config, world, num_micro_steps=NUM_MICRO_STEPS)
    engine.module.train()
    norms, shown, truth = Norms(engine, config.optim, lambda step: True), Shown(), []
    for step in range(NUM_STEPS):
        images, targets = draw(step)
        twin = copy.deepcopy(engine.module) if config.engine == "ddp" else None
        mine = slice(world.rank * 32 // world.size, (world.rank + 1) * 32 // world.size)
        for some in zip(images[mine].chunk(NUM_MICRO_STEPS), targets[mine].chunk(NUM_MICRO_STEPS), strict=True):
            engine.backward(soft_target_loss(engine(some[0]), some[1]).sum())
        norms.measure(step, lambda: engine.step(1e-3))
        norms.log(shown)
        if twin is not None:
            soft_target_loss(twin(images), targets).mean().backward()
            truth += [[step + 1, *found] for found in true_norms(engine.module, twin).items()]
    rows = [
        [step, kind, {stage: of_stage.tolist() for stage, of_stage in found.items()}] for step, kind, found in shown
    ]
    return {"shown": world.gather(rows), "truth": truth}


def run_all(world: World) -> dict[str, Any]:
    report = {}
    for name, overrides in ENGINES.items():
        report[name] = run_steps(overrides, world)
        gc.collect()  # engines hold themselves in circles
    return report


if __name__ == "__main__":
    report_to_file(run_all)
