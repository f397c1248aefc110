"""The loop of training. What it works with is put together in `run.py`."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from gcvit.config import Config
from gcvit.data.stream import Batch
from gcvit.data.transforms import DeviceAugment
from gcvit.loss import soft_target_loss
from gcvit.nonfinite import BadSteps, poison_nonfinite
from gcvit.parallel.engine import StepResult
from gcvit.parallel.world import World
from gcvit.run import Run, evaluate_all, save, settle_damage
from gcvit.schedule import is_time


@dataclass(frozen=True)
class Step:
    """What an optimizer step did, on the device."""

    lr: float
    losses: list[Tensor]  # [b] of each micro-step, of this rank's samples
    loss_sum: Tensor  # []
    result: StepResult


def train(run: Run) -> None:
    """Train to the schedule's end. Every rank calls it."""
    state, last = run.state, run.schedule.total_steps
    bad_steps = BadSteps(run)
    for batches in islice(run.stream, last - state.step):
        step = take_step(run, batches)
        if run.ema:
            run.ema.update()
        run.metrics.add(step.loss_sum, step.result)
        run.damage.add(batches)
        bad_steps.add(batches, step.losses, step.result)

        state.step, state.samples = state.step + 1, state.samples + run.config.global_batch_size
        evaluates, saves = (is_time(state.step, every, last) for every in (run.every.evaluate, run.every.save))
        # What is counted between rows is in no checkpoint: a row ends where a resume begins. And a hopeless run is
        # neither evaluated nor saved without a word.
        if evaluates or saves or is_time(state.step, run.every.log, last):
            run.metrics.log_step(state.step, step.lr, step.result)
            settle_damage(run)
            bad_steps.settle()
            run.saver.poll()
        with run.metrics.off_the_clock():
            is_best = evaluates and evaluate_all(run)
            if is_best or saves:
                save(run)


def take_step(run: Run, batches: tuple[Batch, ...]) -> Step:
    """The update that follows `state.step` finished ones."""
    config, world, engine, step = run.config, run.world, run.engine, run.state.step
    engine.module.train()
    all_losses, loss_sum = [], torch.zeros((), device=world.device)
    for micro_step, (images, targets) in enumerate(on_device(batches, run.augment, step, config, world)):
        seed_drop_path(config.seed, step, micro_step, world.rank)
        losses = soft_target_loss(engine(images), targets)
        engine.backward(poison_nonfinite(losses).sum())
        all_losses.append(losses.detach())
        loss_sum += losses.detach().sum()
    lr = run.schedule.lr(step)
    result = engine.step(lr, head_only=step < run.schedule.frozen_steps)
    return Step(lr, all_losses, loss_sum, result)


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
