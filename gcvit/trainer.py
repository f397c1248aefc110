"""The loop of training. What it works with is put together in `run.py`."""

import hashlib
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from gcvit.config import Config
from gcvit.data.stream import Batch
from gcvit.data.transforms import DeviceAugment
from gcvit.loss import soft_target_loss
from gcvit.parallel.world import World
from gcvit.run import Run, evaluate_all, save, settle_damage
from gcvit.schedule import is_time


def train(run: Run) -> None:
    """Train to the schedule's end. Every rank calls it."""
    config, world, engine, state = run.config, run.world, run.engine, run.state
    last = run.schedule.total_steps
    augment = DeviceAugment(config.augment, config.data, num_classes=config.model.num_classes, seed=config.seed)
    for step, batches in enumerate(islice(run.stream, last - state.step), start=state.step):
        engine.module.train()
        loss_sum = torch.zeros((), device=world.device)
        for micro_step, (images, targets) in enumerate(on_device(batches, augment, step, config, world)):
            seed_drop_path(config.seed, step, micro_step, world.rank)
            loss = soft_target_loss(engine(images), targets).sum()
            engine.backward(loss)
            loss_sum += loss.detach()
        lr = run.schedule.lr(step)
        result = engine.step(lr)
        if run.ema:
            run.ema.update()
        run.metrics.add(loss_sum, result)
        run.damage.add(batches)

        state.step, state.samples = step + 1, state.samples + config.global_batch_size
        if is_time(state.step, run.every.log, last):
            run.metrics.log_step(state.step, lr, result)
            settle_damage(run)
        with run.metrics.off_the_clock():
            is_best = is_time(state.step, run.every.evaluate, last) and evaluate_all(run)
            if is_best or is_time(state.step, run.every.save, last):
                save(run)


def on_device(
    batches: tuple[Batch, ...], augment: DeviceAugment, step: int, config: Config, world: World
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images [b, 3, H, W] and soft targets [b, C] of each micro-step, on the device.

    A rank without samples takes part with one black image whose target is all zero: its loss and gradients are zero.
    """
    for batch in batches:
        if len(batch.labels):
            yield augment(batch, step, world.device)
        else:
            size = config.model.img_size
            yield (
                torch.zeros(1, 3, size, size, device=world.device),
                torch.zeros(1, config.model.num_classes, device=world.device),
            )


def seed_drop_path(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Make what the model draws depend on (seed, step, micro-step, rank) alone, so that a resume draws the same."""
    digest = hashlib.blake2b(repr((seed, step, micro_step, rank)).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest))
