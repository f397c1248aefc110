"""torch.compile per part. The model's cut points are cut down to two blocks of one shape."""

import pytest
import torch
from torch._dynamo.utils import counters

from gcvit.model import GCViT
from gcvit.optim.adamw import MODEL
from gcvit.optim.loss import soft_target_loss
from gcvit.parallel.build import build_engine
from gcvit.training.trainer import seed_drop_path
from tests.helpers.engines import configure, draw_batch

TWO_ALIKE = ["stages.0.blocks.0", "stages.0.blocks.2"]
DEEPER = "model.overrides.depths=[4, 2, 2, 2]"


def run_steps(name: str, world, sizes: tuple[int, int], *overrides: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of two steps, whose two micro-batches have these sizes, and of an evaluation; the weights after them."""
    engine = build_engine(configure(name, DEEPER, *overrides), world, num_micro_steps=2)
    engine.module.train()
    losses = []
    for step in range(2):
        for micro_step, size in enumerate(sizes):
            images, targets = draw_batch(world.device, size, seed=10 * step + micro_step)
            seed_drop_path(0, step, micro_step, world.rank)
            loss = soft_target_loss(engine(images), targets).sum()
            engine.backward(loss)
            losses.append(loss.item())
        engine.step(1e-3)
    engine.module.eval()
    with torch.no_grad():
        images, targets = draw_batch(world.device, seed=20)
        losses.append(soft_target_loss(engine(images), targets).sum().item())
    return losses, {n: part.data.clone() for n, part in engine.fragments()[MODEL].items()}


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "overrides", "sizes", "num_graphs"),
    [
        # The graphs of a size of micro-batch and of evaluation, each shared by both blocks.
        ("ddp", [], (4, 3), 3),
        ("fsdp", ["fsdp.unit_parameters=1000"], (4, 4), 2),
        ("zero2", [], (4, 4), 2),
        # One block is wrapped and the other, as the last part, is not: each has graphs of its own.
        ("ddp", ["activation_checkpointing=selective"], (4, 4), 4),
        # As above, and the first block is never dropped.
        ("fsdp", ["model.drop_path=0.3", "activation_checkpointing=full"], (4, 4), 4),
    ],
    ids=["ddp, smaller micro-batch", "fsdp", "zero2", "ddp, linear layers kept", "fsdp, drop path, recomputed"],
)
def test_compiled_parts_compute_the_same(name, overrides, sizes, num_graphs, world, monkeypatch):
    monkeypatch.setattr(GCViT, "cut_points", lambda self: TWO_ALIKE)
    expected_losses, expected = run_steps(name, world, sizes, *overrides)
    torch._dynamo.reset()
    counters.clear()
    losses, weights = run_steps(name, world, sizes, *overrides, "compile=true")
    assert counters["stats"]["unique_graphs"] == num_graphs
    assert not counters["graph_break"]
    assert not counters["unimplemented"]
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
    for n, weight in weights.items():
        # Adam makes a whole step of lr out of a gradient that is nothing but rounding.
        torch.testing.assert_close(weight, expected[n], rtol=1e-3, atol=2e-4, msg=n)
