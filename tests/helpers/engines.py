"""Build engines of a tiny model, draw their batches, step them, and copy their state."""

import torch
from torch import Tensor

from gcvit.config.load import load_config
from gcvit.config.schema import Config
from gcvit.model import GCViT
from gcvit.model.from_config import build_model
from gcvit.optim.clip_grad import StepResult
from gcvit.optim.loss import soft_target_loss
from gcvit.parallel.build import build_engine
from gcvit.parallel.engine import Engine
from gcvit.runtime.distributed import World
from tests.helpers.launching import ROOT

ENGINES = {
    "ddp": ["engine=ddp"],
    "fsdp": ["engine=fsdp"],
    "fsdp keeping": ["engine=fsdp", "fsdp.reshard_after_forward=false"],
    "zero1": ["engine=zero", "zero.stage=1"],
    "zero2": ["engine=zero", "zero.stage=2"],
    "zero3": ["engine=zero", "zero.stage=3"],
}
# At 32x32 the variant's own windows are single positions. Attention is constant there, and queries have no gradient.
SHAPE = ["model.overrides.depths=[2, 2, 2, 2]", "model.overrides.windows=[4, 2, 2, 1]"]


def configure(name: str, *overrides: str) -> Config:
    """Load the config of the golden runs for the engine `name` of `ENGINES`."""
    return load_config(ROOT / "tests/helpers/golden.yaml", [*ENGINES[name], *SHAPE, *overrides])[0]


def build(name: str, world: World, *overrides: str, num_micro_steps: int = 1) -> Engine:
    """Build the engine `name` on the device of `world`."""
    return build_engine(configure(name, *overrides), world, num_micro_steps=num_micro_steps)


def build_bare_model(config: Config, device: torch.device) -> GCViT:
    """Build the same model without an engine, in training mode, its weights undefined."""
    return build_model(config.model).train().to(device)


def draw_batch(device: torch.device, num_images: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw images [b, 3, 32, 32] and soft targets [b, 4], the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, 3, 32, 32, generator=generator)
    targets = torch.softmax(torch.randn(num_images, 4, generator=generator), 1)
    return images.to(device), targets.to(device)


@torch.no_grad()
def compute_logits(engine: Engine, training: bool = False) -> Tensor:
    """Compute the logits [4, 4] of the first batch."""
    engine.module.train(training)
    return engine(draw_batch(engine.world.device)[0])


def train_step(engine: Engine, seed: int = 0, factor: float = 1.0, lr: float = 1e-3) -> StepResult:
    """Run one step on one batch, whose loss is multiplied by `factor`."""
    images, targets = draw_batch(engine.world.device, seed=seed)
    engine.module.train()
    engine.backward(soft_target_loss(engine(images), targets).sum() * factor)
    return engine.step(lr)


def copy_all(engine: Engine) -> dict[str, Tensor]:
    """Copy all weights and moments that this rank holds, by kind and name."""
    return {f"{kind}.{n}": part.data.clone() for kind, parts in engine.fragments().items() for n, part in parts.items()}
