"""Convert durations to steps, and compute the learning rate of a step. It has no state, so a resume needs none.

The cosine of the published recipe counts from step 0, and the linear warm-up *replaces* its first part. So the rate
jumps at the end of the warm-up (timm's CosineLRScheduler with `warmup_prefix=False`).
"""

import math
from dataclasses import dataclass

from gcvit.config.schema import DURATION, OptimConfig, ScheduleConfig
from gcvit.errors import UserError


def to_samples(duration: str, *, global_batch_size: int, samples_per_epoch: int) -> float:
    """Convert a duration such as "20 epochs", "500 steps" or "1e6 samples" to samples."""
    match = DURATION.match(duration)
    assert match, f"the config accepted {duration!r}"
    unit = {"sample": 1, "step": global_batch_size, "epoch": samples_per_epoch}[match["unit"]]
    return float(match["amount"]) * unit


def to_steps(duration: str, *, global_batch_size: int, samples_per_epoch: int) -> int:
    """Convert a duration to optimizer steps, rounded to the nearest."""
    samples = to_samples(duration, global_batch_size=global_batch_size, samples_per_epoch=samples_per_epoch)
    return round(samples / global_batch_size)


@dataclass(frozen=True)
class Schedule:
    """Hold the learning rate of each step and the length of the run, in optimizer steps."""

    peak_lr: float
    warmup_lr: float
    min_lr: float
    warmup_steps: int
    cosine_steps: int
    cooldown_steps: int
    frozen_steps: int = 0
    """The number of first steps that update the head alone."""

    @property
    def total_steps(self) -> int:
        return self.cosine_steps + self.cooldown_steps

    def lr(self, step: int) -> float:
        """Compute the learning rate of update `step`, which counts from 0."""
        if step < self.warmup_steps:
            return self.warmup_lr + step * (self.peak_lr - self.warmup_lr) / self.warmup_steps
        if step >= self.cosine_steps:
            return self.min_lr
        cosine = math.cos(math.pi * step / self.cosine_steps)
        return self.min_lr + 0.5 * (self.peak_lr - self.min_lr) * (1 + cosine)


def build_schedule(
    schedule: ScheduleConfig, optim: OptimConfig, *, global_batch_size: int, samples_per_epoch: int
) -> Schedule:
    """Resolve the recipe's durations for a data set.

    Raises:
        UserError: if nothing would be trained, or one phase does not fit into another.
    """
    warmup, cosine, cooldown, frozen = (
        to_steps(duration, global_batch_size=global_batch_size, samples_per_epoch=samples_per_epoch)
        for duration in (schedule.warmup, schedule.cosine, schedule.cooldown, optim.frozen_backbone or "0 steps")
    )
    if cosine < 1:
        raise UserError(
            "schedule.cosine is shorter than one step",
            got=f"{schedule.cosine} of {samples_per_epoch} samples in batches of {global_batch_size}",
            hint="lengthen it, or use a smaller global_batch_size",
        )
    if warmup > cosine:
        raise UserError("schedule.warmup is longer than schedule.cosine", got=f"{warmup} > {cosine} steps")
    if frozen >= cosine + cooldown:
        raise UserError(
            "optim.frozen_backbone is as long as the run",
            got=f"{frozen} of {cosine + cooldown} steps",
            hint="shorten it, or lengthen schedule.cosine",
        )
    return Schedule(optim.lr, optim.warmup_lr, optim.min_lr, warmup, cosine, cooldown, frozen)


def is_time(step: int, every_steps: int, total_steps: int) -> bool:
    """Return whether something done every `every_steps` steps is due after step `step`; it always is after the last."""
    return step % max(1, every_steps) == 0 or step == total_steps
