"""Find steps whose loss or gradient is not finite: they change nothing, are logged, and end a diverged run.

The engine refuses such an update on all ranks alike (`engine.py`). The flags that tell which samples caused it stay on
the device, a byte or two for each sample, and are read at logging steps only. A NaN that arises anywhere in a sample's
backward pass reaches the gradient of the stem's output, where samples are still separate.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gcvit.data.batch import Batch
from gcvit.monitoring.metric_logger import MetricLogger
from gcvit.optim.clip_grad import StepResult
from gcvit.runtime.distributed import World

_NUM_NAMED = 20  # samples of a step and rank that are named; more names would not tell more
_NUM_RANKS = 4  # ranks of a step that are logged
_NUM_LISTED = 3  # refused steps that the error describes


class TooManyNonfiniteSteps(Exception):
    """The last `max_steps` updates were all refused.

    Attributes:
        steps: The refused steps in a row; they count finished steps, from 1.
        descriptions: The log lines of the first of them.
    """

    def __init__(self, steps: Sequence[int], descriptions: Sequence[str]):
        super().__init__(f"steps {steps[0]} to {steps[-1]} were refused: loss or gradient not finite")
        self.steps, self.descriptions = list(steps), list(descriptions)


def poison_nonfinite(losses: Tensor) -> Tensor:
    """Make each non-finite loss and its gradient NaN.

    Otherwise an update could be applied although a loss is not finite, for example if a class has target 0 and logit
    -inf.

    Returns:
        Losses, [b]; finite ones are unchanged.
    """
    return losses * torch.where(torch.isfinite(losses.detach()), 1.0, math.nan)


class _Finding(NamedTuple):
    """The samples of one rank and step whose "loss" or "gradient" is not finite."""

    what: str
    num_samples: int
    positions: list[int]  # in the global batch, of the first `_NUM_NAMED`


@dataclass(frozen=True)
class _MicroStep:
    """One rank's samples of a micro-step, and flags of those that are not finite."""

    positions: Tensor  # int64 [b], on the host; none for a rank without samples, which still computes with one image
    bad_loss: Tensor  # bool [max(b, 1)], on the device
    bad_gradient: Tensor


@dataclass(frozen=True)
class _Step:
    number: int  # of finished steps, with this one
    applied: Tensor  # [], as in `StepResult`
    micro_steps: tuple[_MicroStep, ...]

    def find_nonfinite(self) -> list[_Finding]:
        """Find this rank's samples whose loss is not finite, and those whose gradient alone is not."""
        found: dict[str, list[int]] = {"loss": [], "gradient": []}
        for micro_step in self.micro_steps:
            flags = torch.stack([micro_step.bad_loss, micro_step.bad_gradient]).tolist()
            for position, bad_loss, bad_gradient in zip(micro_step.positions.tolist(), *flags, strict=False):
                if bad_loss or bad_gradient:
                    found["loss" if bad_loss else "gradient"].append(position)
        return [_Finding(what, len(at), at[:_NUM_NAMED]) for what, at in found.items() if at]


class NonfiniteGuard:
    """Logs who caused each refused step, and stops a diverged run. Every rank has one and makes the same calls.

    Args:
        stem: The model's first module; the gradient of its output is watched from here on.
        name_samples: Finds samples' names by step * global_batch_size + position; called on all ranks.
        max_steps: Refused steps in a row at which `check` raises.
    """

    def __init__(
        self,
        stem: nn.Module,
        world: World,
        metrics: MetricLogger,
        name_samples: Callable[[Sequence[int]], list[str]],
        *,
        max_steps: int,
        precision: str,
        global_batch_size: int,
    ):
        self._world, self._metrics, self._name_samples = world, metrics, name_samples
        self._max_steps, self._precision, self._global_batch_size = max_steps, precision, global_batch_size
        self._gradients: list[Tensor] = []  # flags of the micro-steps since `add`
        self._steps: list[_Step] = []  # since `check`
        self._refused: list[int] = []  # the refused steps in a row, up to now
        self._descriptions: list[str] = []  # log lines of the first of them
        stem.register_forward_hook(self._watch_output)

    def add(self, step: int, batches: Sequence[Batch], losses: Sequence[Tensor], result: StepResult) -> None:
        """Record finished step number `step`: batch and losses [b] of each micro-step. Never waits."""
        gradients, self._gradients = self._gradients, []
        micro_steps = tuple(
            _MicroStep(batch.positions, ~torch.isfinite(loss), gradient)
            for batch, loss, gradient in zip(batches, losses, gradients, strict=True)
        )
        self._steps.append(_Step(step, result.applied, micro_steps))

    def check(self) -> None:
        """Log the steps that were refused since the last call; one read from the device if there is none.

        Raises:
            TooManyNonfiniteSteps: On all ranks alike, if the last `max_steps` steps were all refused.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        applied = torch.stack([step.applied for step in steps]).tolist()
        logged = self._log([step for step, is_applied in zip(steps, applied, strict=True) if not is_applied])
        for step, is_applied in zip(steps, applied, strict=True):
            if is_applied:
                self._refused, self._descriptions = [], []
            else:
                self._refused.append(step.number)
                self._descriptions += logged.get(step.number, [])[: _NUM_LISTED - len(self._descriptions)]
        if len(self._refused) >= self._max_steps:
            raise TooManyNonfiniteSteps(self._refused, self._descriptions)

    def _watch_output(self, stem: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._flag_gradient)

    def _flag_gradient(self, gradient: Tensor) -> None:
        # A sum is not finite if any term is not, and reads the gradient once.
        self._gradients.append(~torch.isfinite(gradient.sum(dim=(1, 2, 3), dtype=torch.float32)))

    def _log(self, refused: Sequence[_Step]) -> dict[int, list[str]]:
        """Log who caused each refused step. The ranks communicate only if there is one.

        Returns:
            The log lines by step.
        """
        if not refused:
            return {}
        of_ranks = self._world.gather([step.find_nonfinite() for step in refused])
        rows: list[tuple[int, int | None, _Finding]] = []
        for index, step in enumerate(refused):
            found = [(step.number, rank, x) for rank, of_rank in enumerate(of_ranks) for x in of_rank[index]]
            if self._precision == "fp16" and not any(x.what == "loss" for _, _, x in found):
                continue  # the loss scale was too high; refused steps are how it is adjusted
            rows += found[:_NUM_RANKS] or [(step.number, None, _Finding("gradient", 0, []))]
        numbers = [(step - 1) * self._global_batch_size + p for step, _, found in rows for p in found.positions]
        names = iter(self._name_samples(numbers))
        logged: dict[int, list[str]] = {}
        for number, rank, finding in rows:
            samples = list(islice(names, len(finding.positions)))
            line = self._metrics.log_refused_step(number, rank, finding.what, samples, finding.num_samples)
            logged.setdefault(number, []).append(line)
        return logged
