"""Train: the loop, one step, and when to log, evaluate and save. `setup.py` builds the trainer."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from gcvit.checkpoint import resolve, store
from gcvit.checkpoint.format import step_dir
from gcvit.checkpoint.manager import CheckpointManager, FinishedSave
from gcvit.checkpoint.store import RunState
from gcvit.config.schema import Config, ModelConfig
from gcvit.data.batch import Batch
from gcvit.data.corruption_budget import CorruptionBudget
from gcvit.data.epoch_iterator import find_samples
from gcvit.data.source import Source
from gcvit.data.transforms import DeviceAugment
from gcvit.errors import Preempted, UserError
from gcvit.evaluation.evaluator import Result, evaluate
from gcvit.monitoring.metric_logger import MetricLogger
from gcvit.monitoring.norms import Norms
from gcvit.monitoring.profiler import Profiler
from gcvit.monitoring.sample_grid import SampleGrid
from gcvit.monitoring.step_timer import StepTimer, time_waits
from gcvit.optim.clip_grad import StepResult
from gcvit.optim.loss import soft_target_loss
from gcvit.optim.lr_schedule import Schedule, is_time
from gcvit.parallel.engine import Engine
from gcvit.runtime import heartbeat
from gcvit.runtime.distributed import World
from gcvit.runtime.preemption import Preemption
from gcvit.training.ema import Ema, all_fragments
from gcvit.training.nonfinite import NonfiniteGuard, TooManyNonfiniteSteps, poison_nonfinite

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Intervals:
    """Optimizer steps from one log row, evaluation or save to the next."""

    log: int
    evaluate: int
    save: int


@dataclass(frozen=True)
class StepOutput:
    """The results of one optimizer step; the tensors stay on the device."""

    lr: float
    losses: list[Tensor]  # [b] of each micro-step, of this rank's samples
    loss_sum: Tensor  # []
    num_correct: Tensor  # [], int64: samples whose largest logit is their target's largest class
    result: StepResult


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """The training loop and everything it works with. Every rank has one and makes the same calls.

    Only the engine, the EMA and the state change in training.
    """

    config: Config
    world: World
    train_source: Source
    val_source: Source
    schedule: Schedule
    intervals: Intervals
    stream: Iterator[tuple[Batch, ...]]  # this rank's micro-batches of each step
    augment: DeviceAugment
    engine: Engine
    ema: Ema | None
    state: RunState
    checkpoints: CheckpointManager
    metrics: MetricLogger
    corruption: CorruptionBudget
    timer: StepTimer
    sample_grid: SampleGrid
    norms: Norms
    profiler: Profiler

    def train(self) -> None:
        """Train to the end of the schedule.

        Raises:
            Preempted: A preemption was requested; the finished steps are saved.
            UserError: Too many updates in a row were refused; the state before the first of them is saved.
        """
        first_step, preemption = self.state.step, Preemption(self.world)
        try:
            with time_waits(self.timer, self.engine):
                self._run_steps(preemption)
        except TooManyNonfiniteSteps as stop:
            self._roll_back_and_raise(stop)
        except Preempted:
            logger.warning(f"preempted after step {self.state.step}; the same command resumes from there")
            if self.state.step > first_step:
                self.save()
                log_saves(self.metrics, self.checkpoints.wait())
            self.metrics.log_end(self.state.step, "preempted", self.state.samples, None)
            raise
        preemption.close()
        log_saves(self.metrics, self.checkpoints.wait())
        self.metrics.log_end(self.state.step, "finished", self.state.samples, self.state.best_top1)

    def _run_steps(self, preemption: Preemption) -> None:
        """Run the steps that are left.

        Raises:
            Preempted: On all ranks alike, between two steps or in an evaluation.
            TooManyNonfiniteSteps: On all ranks alike, at a logging step.
        """
        state, intervals, last_step = self.state, self.intervals, self.schedule.total_steps
        guard = self._build_guard()
        with self.metrics.paused():
            preemption.raise_if_requested()
            if state.evaluation_due:
                self.evaluate_postponed(preemption.raise_if_requested)
            self.profiler.step(state.step)
        for batches in self.timer.batches(islice(self.stream, last_step - state.step)):
            step = self.train_step(batches)
            self.timer.switch(None)
            state.step, state.samples = state.step + 1, state.samples + self.config.global_batch_size
            self.metrics.add(step.loss_sum, step.num_correct, step.result)
            self.corruption.add(batches)
            guard.add(state.step, batches, step.losses, step.result)
            heartbeat.mark_step(state.step)
            with self.metrics.paused():
                self.profiler.step(state.step)

            is_preempted = preemption.is_agreed()
            should_log = is_time(state.step, intervals.log, last_step)
            should_evaluate = is_time(state.step, intervals.evaluate, last_step)
            should_save = is_time(state.step, intervals.save, last_step)
            # A checkpoint holds no sums of the log: a row ends wherever a resume may begin. The guard comes before
            # evaluation and save, so that a diverged run neither becomes the best nor prunes what came before.
            if should_log or should_evaluate or should_save or is_preempted:
                self.log_step(step)
                guard.check()
                log_saves(self.metrics, self.checkpoints.poll())
            state.evaluation_due = should_evaluate
            if is_preempted:
                raise Preempted
            with self.metrics.paused():
                is_best = should_evaluate and self.evaluate(preemption.raise_if_requested)
                if is_best or should_save:
                    with self.timer.during("checkpoint"):
                        self.save()

    def train_step(self, batches: tuple[Batch, ...]) -> StepOutput:
        """Accumulate the gradient over this rank's micro-batches and do the update that follows `state.step` ones.

        The timer is left at "compute".
        """
        config, engine, step = self.config, self.engine, self.state.step
        self.timer.switch("compute")
        engine.module.train()
        all_losses, loss_sum = [], torch.zeros((), device=self.world.device)
        num_correct = torch.zeros((), dtype=torch.int64, device=self.world.device)
        inputs = copy_to_device(batches, self.augment, step, config.model, self.world.device, self.timer)
        for micro_step, (images, targets) in enumerate(inputs):
            if micro_step == 0:
                self.sample_grid.add(step, batches[0], images, targets)
            seed_drop_path(config.seed, step, micro_step, self.world.rank)
            logits = engine(images)
            losses = soft_target_loss(logits, targets)
            engine.backward(poison_nonfinite(losses).sum())
            self.timer.switch("compute")  # the exchange of gradients is over, see `time_waits`
            all_losses.append(losses.detach())
            loss_sum += losses.detach().sum()
            num_correct += count_correct(logits.detach(), targets)
        lr = self.schedule.lr(step)
        head_only = step < self.schedule.frozen_steps
        result = self.norms.measure(step, lambda: engine.step(lr, head_only=head_only))
        if self.ema:
            self.ema.update()
        return StepOutput(lr, all_losses, loss_sum, num_correct, result)

    def log_step(self, step: StepOutput) -> None:
        """Log a row of metrics, the newly found corrupt samples and, at some steps, sample images and norms.

        Raises:
            UserError: On all ranks alike, if more samples are corrupt than `data.max_corrupt_fraction` allows.
        """
        number, seconds = self.state.step, self.timer.snapshot(self.world.barrier)
        new = self.corruption.sync(self.world)
        num_corrupt = len(self.corruption.found)
        self.metrics.log_step(number, step.lr, step.result, seconds, num_corrupt)
        self.metrics.log_corruption(number, new, num_corrupt)
        self.sample_grid.write(self.metrics)
        self.norms.log(self.metrics)
        self.corruption.check()

    def evaluate(self, on_batch: Callable[[], None]) -> bool:
        """Evaluate the weights and their EMA on the validation set.

        Args:
            on_batch: Called after each batch, on all ranks alike; what it raises leaves the trainer as it was.

        Returns:
            Whether the best top-1 accuracy so far is beaten, by the EMA if there is one.
        """
        self.engine.module.eval()
        results: dict[str, Result] = {}
        seconds: dict[str, float] = {}
        for name, weights in (
            ("weights", nullcontext()),
            *((("ema", self.ema.swapped_in(self.engine)),) if self.ema else ()),
        ):
            begin = time.perf_counter()
            with weights:
                results[name] = evaluate(
                    self.engine,
                    self.val_source,
                    self.config.data,
                    self.world,
                    img_size=self.config.model.img_size,
                    batch_size=self.config.trainer.eval_batch_size,
                    skip_corrupt=True,  # logged and counted; an error would lose the steps since the last save
                    on_batch=on_batch,
                )
            seconds[name] = time.perf_counter() - begin
        for name, result in results.items():
            self.metrics.log_evaluation(self.state.step, name, result.as_dict() | {"seconds": seconds[name]})
        self.state.evaluation_due = False
        top1 = results["ema" if self.ema else "weights"].top1
        if top1 <= self.state.best_top1:
            return False
        self.state.best_top1, self.state.best_step = top1, self.state.step
        return True

    def evaluate_postponed(self, on_batch: Callable[[], None]) -> None:
        """Do the evaluation that a preemption postponed, and record it in the checkpoint that the run resumed from."""
        is_best = self.evaluate(on_batch)
        path = self._checkpoint_path()
        if self.world.on_rank0(path.exists):
            self.world.on_rank0(lambda: store.restate(path, self.state))
        elif is_best:  # the run resumed from a checkpoint in another run's folder
            self.save()

    def save(self, *, prunes: bool = True) -> None:
        """Begin to write a checkpoint, by all ranks together. `prunes` and Raises: as `CheckpointManager.save`."""
        self.state.counters = self.engine.counters()
        self.state.ema_updates = self.ema.updates if self.ema else 0
        info = {
            "config": self.config.model_dump(mode="json"),
            "data": self.train_source.digest,
            "world_size": self.world.size,
            "classes": list(self.train_source.classes),
        }
        tensors = all_fragments(self.engine, self.ema)
        log_saves(self.metrics, self.checkpoints.save(self.state, tensors, info, prunes=prunes))

    def name_samples(self, numbers: Sequence[int]) -> list[str]:
        """Find the names of samples by their numbers in the order of training. Every rank calls it.

        Args:
            numbers: step * global_batch_size + position, of steps that count from 0.

        Returns:
            Names as the source has them, on every rank. A corrupt sample is marked as replaced.
        """

        def find_names() -> list[str]:
            wanted = np.array(numbers, dtype=np.int64)
            samples = find_samples(self.train_source, self.config.data, self.config.seed, wanted).tolist()
            replaced = " (corrupt: another stood in for it)"
            return [self.train_source.name(sample) + replaced * (sample in self.corruption.found) for sample in samples]

        return self.world.on_rank0(find_names)

    def _build_guard(self) -> NonfiniteGuard:
        return NonfiniteGuard(
            self.engine.module.stem,
            self.world,
            self.metrics,
            self.name_samples,
            max_steps=self.config.trainer.max_nonfinite_steps,
            precision=self.config.precision,
            global_batch_size=self.config.global_batch_size,
        )

    def _roll_back_and_raise(self, stop: TooManyNonfiniteSteps) -> NoReturn:
        """Save the state before the refused steps, which changed nothing but the EMA and a loss scale.

        Raises:
            UserError: Always, with the commands that explain the steps and resume.
        """
        state, first_step = self.state, stop.steps[0]
        state.samples -= (state.step - (first_step - 1)) * self.config.global_batch_size
        state.step = first_step - 1
        path = self._checkpoint_path()
        log_saves(self.metrics, self.checkpoints.wait())
        if not self.world.on_rank0(path.exists):
            self.save(prunes=False)  # newer ones may lie between the refused steps
            log_saves(self.metrics, self.checkpoints.wait())
        is_newest = self.world.on_rank0(lambda: store.latest(path.parent) == path)
        raise UserError(
            f"{len(stop.steps)} updates in a row were refused: loss or gradient not finite",
            got=f"steps {first_step} to {stop.steps[-1]}" + "".join(f"; {text}" for text in stop.descriptions),
            expected=f"fewer than trainer.max_nonfinite_steps={self.config.trainer.max_nonfinite_steps}",
            hint=f"the same command with --replay {first_step} shows where it begins; {path} is from before it"
            + (", and --resume auto goes on from there, at a lower optim.lr for example" if is_newest else ""),
        ) from None

    def _checkpoint_path(self) -> Path:
        """The path of this run's checkpoint of `state.step`, whether it exists or not."""
        return resolve.checkpoints_of(self.config.run_dir) / step_dir(self.state.step)


def log_saves(metrics: MetricLogger, finished: Iterable[FinishedSave]) -> None:
    """Log checkpoints that are complete, and their messages."""
    for save in finished:
        for message in save.messages:
            logger.warning(message)
        row = {"stall_seconds": save.stall_seconds, "write_seconds": save.write_seconds, "bytes": save.bytes}
        metrics.log_checkpoint(save.step, row)


def count_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Count rows of logits [b, C] whose largest is the targets' largest; an image without a target is never right."""
    is_right = logits.argmax(1) == targets.argmax(1)
    return (is_right & (targets.amax(1) > 0)).sum()


def copy_to_device(
    batches: tuple[Batch, ...],
    augment: DeviceAugment,
    step: int,
    model: ModelConfig,
    device: torch.device,
    timer: StepTimer,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Copy each micro-batch to the device and augment it there.

    A rank without samples takes part with one black image whose target is all zero: its loss and gradients are zero.

    Yields:
        Images [b, 3, H, W] and soft targets [b, C].
    """
    for batch in batches:
        if len(batch.labels):
            with timer.during("copy"):
                images = batch.images_on(device)
            yield augment.augment(images, batch, step)
        else:
            images = torch.zeros(1, 3, model.img_size, model.img_size, device=device)
            yield images, torch.zeros(1, model.num_classes, device=device)


def seed_drop_path(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Seed the model's random numbers by (seed, step, micro-step, rank) alone, so that a resume draws the same."""
    digest = hashlib.blake2b(repr((seed, step, micro_step, rank)).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest))
