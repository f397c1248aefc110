"""Engines with and without torch.compile: `compile_worker.py OUT.json NAME...`, names being those of RUNS.

Each run trains and evaluates in turns, NUM_ROUNDS times. It reports {"losses", "compiled losses", "graphs", "breaks"}:
of the rounds by the plain and by the compiled model, and how many graphs there are after each round.
"""

import gc
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters

from gcvit.config.load import load_config
from gcvit.config.schema import Config
from gcvit.model import GCViT
from gcvit.optim.loss import soft_target_loss
from gcvit.parallel import build
from gcvit.parallel.compile import compile_parts
from gcvit.runtime.distributed import World
from tests.helpers.engine_steps import draw_micro_batches, report_to_file

CONFIG = Path(__file__).parents[1] / "helpers/golden.yaml"
COMPILE = torch.compile
NUM_ROUNDS, NUM_MICRO_STEPS = 3, 2
COMMON = ["global_batch_size=16", "model.drop_path=0.3"]
RUNS = {
    "ddp": ["engine=ddp"],
    "ddp selective": ["engine=ddp", "activation_checkpointing=selective"],
    "ddp blocks": ["engine=ddp", "activation_checkpointing=blocks"],
    "ddp full": ["engine=ddp", "activation_checkpointing=full"],
    "ddp skipping": ["engine=ddp", "activation_checkpointing=full", "model.drop_path_skips=true"],
    "ddp deeper": ["engine=ddp", "model.overrides.depths=[4, 2, 2, 2]"],
    "fsdp": ["engine=fsdp", "fsdp.unit_parameters=10000", "activation_checkpointing=full"],
    "zero2": ["engine=zero", "zero.stage=2", "activation_checkpointing=full"],
}


def compile_without_code(function: Any, *, options: dict[str, Any], **settings: Any) -> Any:
    """What makes code of graphs takes minutes here; which graphs there are does not depend on it."""
    assert options == {"fallback_random": True}
    return COMPILE(function, backend="aot_eager", **settings)


def compile_parts_without_code(model: GCViT) -> None:
    with mock.patch.object(torch, "compile", compile_without_code):
        compile_parts(model)


def run_rounds(config: Config, world: World) -> tuple[list[float], list[int]]:
    """The losses of a run's training and evaluation, and the number of graphs after each round."""
    with mock.patch.object(build, "compile_parts", compile_parts_without_code):
        engine = build.build_engine(config, world, num_micro_steps=NUM_MICRO_STEPS)
    generator = torch.Generator().manual_seed(world.rank)
    losses, graphs = [], []
    for step in range(NUM_ROUNDS):
        engine.module.train()
        for images, targets in draw_micro_batches(config, world, generator, step, NUM_MICRO_STEPS):
            loss = soft_target_loss(engine(images), targets).sum()
            engine.backward(loss)
            losses.append(loss.item())
        engine.step(1e-3)
        engine.module.eval()
        with torch.no_grad():
            losses.append(soft_target_loss(engine(images), targets).sum().item())
        graphs.append(counters["stats"]["unique_graphs"])
    return losses, graphs


def run_all(world: World) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name in sys.argv[2:]:
        found: dict[str, Any] = {}
        for suffix, overrides in (("", []), ("compiled ", ["compile=true"])):
            config, _ = load_config(CONFIG, [*COMMON, *RUNS[name], *overrides])
            torch._dynamo.reset()
            counters.clear()
            found[f"{suffix}losses"], found["graphs"] = run_rounds(config, world)
            gc.collect()  # engines hold themselves in circles
        found["breaks"] = dict(counters["graph_break"])
        report[name] = found
    return report


if __name__ == "__main__":
    report_to_file(run_all)
