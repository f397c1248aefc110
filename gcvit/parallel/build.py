"""Apply parallelism to the model, here only, in this order: recompute, compile, shard, fill."""

from typing import Any

import torch

from gcvit.config.schema import Config, FsdpConfig, ZeroConfig
from gcvit.data.batch_plan import BatchPlan
from gcvit.model.from_config import build_model
from gcvit.optim.adamw import MODEL
from gcvit.parallel.activation_budget import Compute, recompute_within
from gcvit.parallel.activation_checkpointing import recompute_parts
from gcvit.parallel.compile import compile_parts
from gcvit.parallel.ddp import DdpEngine
from gcvit.parallel.engine import Engine, fill
from gcvit.parallel.fsdp import FsdpEngine
from gcvit.runtime.distributed import World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_engine(config: Config, world: World, *, num_micro_steps: int, notices: list[str] | None = None) -> Engine:
    """Build the engine that the config names, with the seed's initial weights: the same for every engine and world.

    Args:
        notices: Receives a line about what was chosen for the user.

    Raises:
        UserError: for options that this machine or world does not support.
    """
    # A model on meta has shapes only: an engine that shards never holds the whole.
    with torch.device("meta"):
        module = build_model(config.model)
    dtype = DTYPES[config.precision]
    if config.activation_budget_bytes is None:
        recompute_parts(module, config.activation_checkpointing)
    else:
        capacity = BatchPlan.from_config(config, world.size, config.trainer.resolved_micro_batch_size).capacity
        compute = Compute(world.device, dtype, autocast=config.engine == "ddp")
        notice = recompute_within(config.activation_budget_bytes, module, compute, capacity, world)
        if notices is not None:
            notices.append(notice)
    if config.compile:
        compile_parts(module)
    common: dict[str, Any] = {"global_batch_size": config.global_batch_size, "num_micro_steps": num_micro_steps}
    engine: Engine
    if config.engine == "ddp":
        engine = DdpEngine(module, config.optim, world, img_size=config.model.img_size, dtype=dtype, **common)
    elif config.engine == "fsdp":
        engine = FsdpEngine(module, config.optim, config.fsdp or FsdpConfig(), world, dtype=dtype, **common)
    else:
        from gcvit.parallel.zero import ZeroEngine  # loading DeepSpeed takes seconds, and only zero needs it

        engine = ZeroEngine(module, config.optim, config.zero or ZeroConfig(), world, dtype=dtype, **common)
    fill(engine.fragments()[MODEL], lambda name: module.initial_value(name, config.seed))
    engine.refresh()
    return engine
