"""The loop of training. What it works with is put together in `setup.py`."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from gcvit.config.schema import Config
from gcvit.data.loader import Batch
from gcvit.data.transforms import DeviceAugment
from gcvit.errors import Preempted
from gcvit.monitoring.step_timer import StepClock, watch_waits
from gcvit.optim.adamw import StepResult
from gcvit.optim.loss import soft_target_loss
from gcvit.optim.lr_schedule import is_time
from gcvit.runtime import heartbeat
from gcvit.runtime.distributed import World
from gcvit.runtime.preemption import Preemption
from gcvit.training.nonfinite import BadSteps, poison_nonfinite
from gcvit.training.run import Run, evaluate_all, evaluate_late, log_step, save


@dataclass(frozen=True)
class Step:
    """What an optimizer step did, on the device."""

    lr: float
    losses: list[Tensor]  # [b] of each micro-step, of this rank's samples
    loss_sum: Tensor  # []
    num_correct: Tensor  # [], int64: samples whose largest logit is their target's largest class
    result: StepResult


def train(run: Run) -> None:
    """Train to the schedule's end. Every rank calls it. Errors: Preempted, once what was trained is saved."""
    first_step, preemption = run.state.step, Preemption(run.world)
    try:
        with watch_waits(run.clock, run.engine):
            take_steps(run, preemption)
    except Preempted:
        run.metrics.say(f"told to leave after step {run.state.step}; the same command goes on from there")
        if run.state.step > first_step:
            save(run)
            run.saver.wait()
        run.metrics.log_end(run.state.step, "preempted", run.state.samples, None)
        raise
    preemption.close()
    run.saver.wait()
    run.metrics.log_end(run.state.step, "finished", run.state.samples, run.state.best_top1)


def take_steps(run: Run, preemption: Preemption) -> None:
    """The loop. Errors: Preempted, on all ranks alike, after a step, with or without its evaluation."""
    state, last = run.state, run.schedule.total_steps
    bad_steps = BadSteps(run)
    with run.metrics.paused():
        preemption.look()
        if state.evaluation_due:
            evaluate_late(run, preemption.look)
        run.profiler.look(state.step)
    for batches in run.clock.batches(islice(run.stream, last - state.step)):
        step = take_step(run, batches)
        if run.ema:
            run.ema.update()
        run.clock.switch(None)
        run.metrics.add(step.loss_sum, step.num_correct, step.result)
        run.corruption.add(batches)
        bad_steps.add(batches, step.losses, step.result)

        state.step, state.samples = state.step + 1, state.samples + run.config.global_batch_size
        heartbeat.mark_step(state.step)
        with run.metrics.paused():
            run.profiler.look(state.step)
        evaluates, saves = (is_time(state.step, every, last) for every in (run.every.evaluate, run.every.save))
        leaves = preemption.is_agreed()
        # What is counted between rows is in no checkpoint: a row ends where a resume begins. And a hopeless run is
        # neither evaluated nor saved without a word.
        if evaluates or saves or leaves or is_time(state.step, run.every.log, last):
            log_step(run, step.lr, step.result)
            bad_steps.settle()
            run.saver.poll()
        state.evaluation_due = evaluates
        if leaves:
            raise Preempted
        with run.metrics.paused():
            is_best = evaluates and evaluate_all(run, preemption.look)
            with run.clock.during("checkpoint"):
                if is_best or saves:
                    save(run)


def take_step(run: Run, batches: tuple[Batch, ...]) -> Step:
    """The update that follows `state.step` finished ones. The clock is left at "compute"."""
    config, world, engine, step, clock = run.config, run.world, run.engine, run.state.step, run.clock
    clock.switch("compute")
    engine.module.train()
    all_losses, loss_sum = [], torch.zeros((), device=world.device)
    num_correct = torch.zeros((), dtype=torch.int64, device=world.device)
    for micro_step, (images, targets) in enumerate(on_device(batches, run.augment, step, config, world, clock)):
        if micro_step == 0:
            run.samples.see(step, batches[0], images, targets)
        seed_drop_path(config.seed, step, micro_step, world.rank)
        logits = engine(images)
        losses = soft_target_loss(logits, targets)
        engine.backward(poison_nonfinite(losses).sum())
        clock.switch("compute")  # the exchange of gradients is over, see `watch_waits`
        all_losses.append(losses.detach())
        loss_sum += losses.detach().sum()
        num_correct += count_correct(logits.detach(), targets)
    lr = run.schedule.lr(step)
    head_only = step < run.schedule.frozen_steps
    result = run.norms.watch(step, lambda: engine.step(lr, head_only=head_only))
    return Step(lr, all_losses, loss_sum, num_correct, result)


def count_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Rows of logits [b, C] whose largest is the targets' largest; an image without a target is never right."""
    is_right = logits.argmax(1) == targets.argmax(1)
    return (is_right & (targets.amax(1) > 0)).sum()


def on_device(
    batches: tuple[Batch, ...], augment: DeviceAugment, step: int, config: Config, world: World, clock: StepClock
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images [b, 3, H, W] and soft targets [b, C] of each micro-step, on the device, copied on the clock.

    A rank without samples takes part with one black image whose target is all zero: its loss and gradients are zero.
    """
    for batch in batches:
        if len(batch.labels):
            with clock.during("copy"):
                images = batch.images_on(world.device)
            yield augment.augment(images, batch, step)
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
