"""Overfit one batch (`train.py --overfit-one-batch`): a correct model, loss and data set learn a few images exactly.

One batch is loaded and augmented as in training, and then repeated at a constant learning rate, without regularization:
drop path, weight decay, frozen layers. Nothing is written.
"""

import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from gcvit.config.schema import Config
from gcvit.data.batch_plan import BatchPlan
from gcvit.data.loader import train_stream
from gcvit.data.source import Source
from gcvit.data.transforms import DeviceAugment
from gcvit.errors import UserError
from gcvit.optim.loss import soft_target_loss
from gcvit.parallel.build import build_engine
from gcvit.parallel.engine import Engine
from gcvit.runtime.distributed import World

NUM_IMAGES = 16
LEARNING_RATE = 1e-3
WARMUP_STEPS = 10  # AdamW's first steps have full length, whatever the gradient
MAX_SECONDS = 60.0
MAX_STEPS = 300
MIN_SHARE = 0.9  # of the way from the first loss to the lowest possible one


@dataclass(frozen=True)
class Progress:
    """The loss and accuracy after some updates; the loss is the mean over the batch."""

    step: int
    loss: float
    top1: float  # percent
    is_finite: bool


def overfit_one_batch(config: Config, world: World, sources: tuple[Source, Source]) -> None:
    """Print how the loss falls, and whether the batch is learned.

    Raises:
        SystemExit: The batch is not learned; the exit code is 1.
        UserError: There is more than one process; and as `build_engine`.
    """
    if world.size > 1:
        raise UserError("--overfit-one-batch is for one process", got=world.size, hint="start train.py by itself")
    config = simplify(config, sources[0])
    images, targets = load_batch(config, world, sources[0])
    floor = -torch.special.xlogy(targets, targets).sum(-1).mean().item()
    engine = build_engine(config, world, num_micro_steps=1)
    size = " x ".join(map(str, images.shape))
    print(f"{config.model.name} on {world.device.type}, images {size}, {targets.shape[1]} classes", flush=True)
    print(f"no loss can be below {floor:.3f}, the entropy of the mixed and smoothed targets", flush=True)
    # In fp16 the loss scale may have to be halved a few times.
    max_nonfinite_steps = config.trainer.max_nonfinite_steps if config.precision == "fp16" else 0
    first, last = learn(engine, images, targets, floor, max_nonfinite_steps)
    share = (first.loss - last.loss) / max(first.loss - floor, 1e-9)
    fell = f"in {last.step} updates the loss went from {first.loss:.3f} to {last.loss:.3f}, {share:.0%} of the way"
    if not last.is_finite:
        hint = "" if config.precision == "fp32" else ". Try precision=fp32"
        sys.exit(f"NOT LEARNED: the loss or its gradient is not finite; {fell}{hint}")
    if share < MIN_SHARE:
        sys.exit(
            f"NOT LEARNED: {fell}; at least {MIN_SHARE:.0%} are expected. Check the images and their labels, data.mean "
            "and data.std, and whether a smaller model or less of augment.* makes a difference"
        )
    print(f"LEARNED: {fell}; top-1 {last.top1:.0f} %", flush=True)


def simplify(config: Config, train: Source) -> Config:
    """Reduce a config to a few images, without regularization."""
    num_images = min(NUM_IMAGES, config.global_batch_size, train.num_samples // 2 * 2)
    plain = {
        "global_batch_size": num_images,
        "compile": False,  # it would take longer than all the rest
        "model": {"drop_path": 0.0, "drop_path_skips": False},
        "fsdp": config.fsdp and config.fsdp.model_copy(update={"shard_size": None}),
        "optim": {"weight_decay": 0.0, "frozen_backbone": None, "layer_decay": None},
        "data": {"num_workers": 0},
        "trainer": {"micro_batch_size": None},
    }
    changes = {
        name: getattr(config, name).model_copy(update=value) if isinstance(value, dict) else value
        for name, value in plain.items()
    }
    return config.model_copy(update=changes)


def load_batch(config: Config, world: World, train: Source) -> tuple[Tensor, Tensor]:
    """Load images [b, 3, H, W] and soft targets [b, C] of the first step, on the device."""
    batch_plan = BatchPlan.from_config(config, world_size=1, micro_batch_size=None)
    stream = train_stream(train, config, batch_plan, start_step=0, rank=0, pin_memory=False)
    (batch,) = next(stream)
    augment = DeviceAugment(config.augment, config.data, num_classes=config.model.num_classes, seed=config.seed)
    return augment(batch, 0, world.device)


def learn(
    engine: Engine, images: Tensor, targets: Tensor, floor: float, max_nonfinite_steps: int
) -> tuple[Progress, Progress]:
    """Update until the batch is learned, time is up, or more than `max_nonfinite_steps` in a row are not finite.

    Returns:
        The first and the last progress.
    """
    engine.module.train()
    start, history, num_bad = time.monotonic(), [], 0
    for step in range(MAX_STEPS + 1):
        logits = engine(images)
        losses = soft_target_loss(logits, targets)
        engine.backward(losses.sum())
        result = engine.step(LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS))
        top1 = 100 * (logits.argmax(-1) == targets.argmax(-1)).float().mean().item()
        now = Progress(step, losses.mean().item(), top1, bool(result.applied.item()))
        history.append(now)
        num_bad = 0 if now.is_finite else num_bad + 1
        is_learned = history[0].loss - now.loss >= MIN_SHARE * (history[0].loss - floor)
        is_over = (
            is_learned or num_bad > max_nonfinite_steps or time.monotonic() - start > MAX_SECONDS or step == MAX_STEPS
        )
        if step % 10 == 0 or is_over:
            print(f"after {step} updates: loss {now.loss:.3f}, top-1 {top1:.0f} %", flush=True)
        if is_over:
            break
    return history[0], history[-1]
