"""The one place where parallelism is applied, from outside, in this order: recompute, (compile,) shard, fill."""

from typing import Any

import torch

from gcvit.config import Config, FsdpConfig, ModelConfig, ZeroConfig
from gcvit.model import GCViT, create_model
from gcvit.parallel.ddp import DdpEngine
from gcvit.parallel.engine import MODEL, Engine, fill
from gcvit.parallel.fsdp import FsdpEngine
from gcvit.parallel.recompute import recompute_parts
from gcvit.parallel.world import World


def build_model(model: ModelConfig) -> GCViT:
    """The bare model that a config names. Errors: UserError for an unknown name or override."""
    return create_model(
        model.name,
        num_classes=model.num_classes,
        img_size=model.img_size,
        drop_path_rate=model.drop_path,
        **(model.overrides.model_dump(exclude_none=True) if model.overrides else {}),
    )


def build_engine(config: Config, world: World, *, num_micro_steps: int) -> Engine:
    """The engine that the config names, with the seed's initial weights: the same for every engine and world."""

    # On meta a model is only shapes: an engine that shards never holds the whole.
    with torch.device("meta"):
        module = build_model(config.model)
    recompute_parts(module, config.activation_checkpointing)
    common: dict[str, Any] = {
        "global_batch_size": config.global_batch_size,
        "num_micro_steps": num_micro_steps,
        "bf16": config.precision == "bf16",
    }
    engine: Engine
    if config.engine == "ddp":
        engine = DdpEngine(module, config.optim, world, img_size=config.model.img_size, **common)
    elif config.engine == "fsdp":
        engine = FsdpEngine(module, config.optim, config.fsdp or FsdpConfig(), world, **common)
    else:
        from gcvit.parallel.zero import ZeroEngine  # loading DeepSpeed takes seconds, and only zero needs it

        engine = ZeroEngine(module, config.optim, config.zero or ZeroConfig(), world, **common)
    fill(engine.fragments()[MODEL], lambda name: module.initial_value(name, config.seed))
    engine.refresh()
    return engine
