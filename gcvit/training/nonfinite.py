"""Steps whose loss or gradient is not finite: they change nothing, are counted and explained, and end a hopeless run.

The engine refuses such an update on all ranks alike (`engine.py`). What tells whose fault it was is kept on the device,
a byte or two for each sample, and read at logging steps alone: a NaN that is born anywhere in a sample's backward pass
flows down to the gradient of the stem's output, where samples still lie apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gcvit.checkpoint.resolve import checkpoints_of
from gcvit.checkpoint.store import latest
from gcvit.data.batch import Batch
from gcvit.data.epoch_iterator import find_samples
from gcvit.errors import UserError
from gcvit.optim.adamw import StepResult
from gcvit.training.run import Run, save

_NUM_NAMED = 20  # samples of a step and rank that are named; where all are bad, the rest says no more
_NUM_RANKS = 4  # of a step, that are told of
_NUM_LISTED = 3  # refused steps that the error describes


def poison_nonfinite(losses: Tensor) -> Tensor:
    """The same losses, [b]; one that is not finite gets a gradient that is not, whatever it was computed by.

    Without this an update could be applied whose loss nobody can read (a class of target 0 and logit -inf, say).
    """
    return losses * torch.where(torch.isfinite(losses.detach()), 1.0, math.nan)


@dataclass(frozen=True)
class _MicroStep:
    """One rank's samples of a micro-step, and which of them went wrong."""

    positions: Tensor  # int64 [b], on the host; none for a rank without samples, which still computes with one image
    bad_loss: Tensor  # bool [max(b, 1)], on the device
    bad_gradient: Tensor


@dataclass(frozen=True)
class _Step:
    number: int  # of finished steps, with this one
    applied: Tensor  # [], as in `StepResult`
    micro_steps: tuple[_MicroStep, ...]

    def find_bad(self) -> list["_Bad"]:
        """This rank's samples whose loss is not finite, and those of which the gradient alone is not."""
        found: dict[str, list[int]] = {"loss": [], "gradient": []}
        for micro_step in self.micro_steps:
            flags = torch.stack([micro_step.bad_loss, micro_step.bad_gradient]).tolist()
            for position, bad_loss, bad_gradient in zip(micro_step.positions.tolist(), *flags, strict=False):
                if bad_loss or bad_gradient:
                    found["loss" if bad_loss else "gradient"].append(position)
        return [_Bad(what, len(at), at[:_NUM_NAMED]) for what, at in found.items() if at]


class _Bad(NamedTuple):
    """Samples of one rank and step: what of them is not finite, how many they are, where the first of them stand."""

    what: str
    num_samples: int
    positions: list[int]


class BadSteps:
    """Watches a run from its beginning. Every rank has one and makes the same calls."""

    def __init__(self, run: Run):
        self._run = run
        self._gradients: list[Tensor] = []  # of the micro-steps since `add`: which samples' are not finite
        self._steps: list[_Step] = []  # since `settle`
        self._row: list[int] = []  # refused steps in a row, up to now
        self._told: list[str] = []  # what was said of the first of them
        run.engine.module.stem.register_forward_hook(self._watch)

    def add(self, batches: Sequence[Batch], losses: Sequence[Tensor], result: StepResult) -> None:
        """Take in the step after `state.step`: batch and losses [b] of each micro-step. Waits for nothing."""
        gradients, self._gradients = self._gradients, []
        micro_steps = tuple(
            _MicroStep(batch.positions, ~torch.isfinite(loss), gradient)
            for batch, loss, gradient in zip(batches, losses, gradients, strict=True)
        )
        self._steps.append(_Step(self._run.state.step + 1, result.applied, micro_steps))

    def settle(self) -> None:
        """Tell of the steps that were refused since the last call; one read where there is none.

        Errors: UserError, on all ranks alike, where the last `trainer.max_nonfinite_steps` were all refused. They
        changed nothing but the EMA and a loss scale, so a checkpoint from before the first of them can still be left.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        applied = torch.stack([step.applied for step in steps]).tolist()
        told = self._tell([step for step, is_applied in zip(steps, applied, strict=True) if not is_applied])
        for step, is_applied in zip(steps, applied, strict=True):
            if is_applied:
                self._row, self._told = [], []
            else:
                self._row.append(step.number)
                self._told += told.get(step.number, [])[: _NUM_LISTED - len(self._told)]
        if len(self._row) >= self._run.config.trainer.max_nonfinite_steps:
            self._stop()

    def _watch(self, stem: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._see_gradient)

    def _see_gradient(self, gradient: Tensor) -> None:
        # A sum passes on what is not finite, and reads the gradient once.
        self._gradients.append(~torch.isfinite(gradient.sum(dim=(1, 2, 3), dtype=torch.float32)))

    def _tell(self, refused: Sequence[_Step]) -> dict[int, list[str]]:
        """Log who caused each refused step; returns the lines by step. The ranks talk only if there is one."""
        if not refused:
            return {}
        run = self._run
        of_ranks = run.world.gather([step.find_bad() for step in refused])
        rows: list[tuple[int, int | None, _Bad]] = []
        for place, step in enumerate(refused):
            found = [(step.number, rank, bad) for rank, of_rank in enumerate(of_ranks) for bad in of_rank[place]]
            if run.config.precision == "fp16" and not any(bad.what == "loss" for _, _, bad in found):
                continue  # the loss scale was too high, which is how it finds its height
            rows += found[:_NUM_RANKS] or [(step.number, None, _Bad("gradient", 0, []))]
        batch_size = run.config.global_batch_size
        names = iter(name_samples(run, [(n - 1) * batch_size + p for n, _, bad in rows for p in bad.positions]))
        told: dict[int, list[str]] = {}
        for number, rank, bad in rows:
            samples = list(islice(names, len(bad.positions)))
            line = run.metrics.log_bad_step(number, rank, bad.what, samples, bad.num_samples)
            told.setdefault(number, []).append(line)
        return told

    def _stop(self) -> None:
        run, state, first = self._run, self._run.state, self._row[0]
        state.samples -= (state.step - (first - 1)) * run.config.global_batch_size
        state.step = first - 1
        path = checkpoints_of(run.config.run_dir) / f"step_{state.step:08d}"
        run.saver.wait()
        if not run.world.on_rank0(path.exists):
            save(run, prunes=False)  # newer ones may lie within the row
            run.saver.wait()
        is_newest = run.world.on_rank0(lambda: latest(path.parent) == path)  # none was saved within the row
        raise UserError(
            f"{len(self._row)} updates in a row were refused: loss or gradient not finite",
            got=f"steps {first} to {self._row[-1]}" + "".join(f"; {line}" for line in self._told),
            expected=f"fewer than trainer.max_nonfinite_steps={run.config.trainer.max_nonfinite_steps}",
            hint=f"the same command with --replay {first} shows where it begins; {path} is from before it"
            + (", and --resume auto goes on from there, at a lower optim.lr for example" if is_newest else ""),
        )


def name_samples(run: Run, numbers: Sequence[int]) -> list[str]:
    """Where the samples lie that the run takes as these, counted from its beginning.

    Every rank calls it, and rank 0 looks. A corrupt sample is said to have been replaced.
    """

    def look() -> list[str]:
        samples = find_samples(run.train, run.config, np.array(numbers, dtype=np.int64)).tolist()
        replaced = " (corrupt: another stood in for it)"
        return [run.train.name(sample) + replaced * (sample in run.corruption.found) for sample in samples]

    return run.world.on_rank0(look)
