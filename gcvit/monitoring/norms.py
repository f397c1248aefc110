"""Measure norms of single parameters and gradients by the model's stages, from any engine's fragments."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gcvit.config.schema import OptimConfig
from gcvit.monitoring.metric_logger import MetricLogger
from gcvit.optim.adamw import EXP_AVG, MODEL
from gcvit.optim.clip_grad import StepResult
from gcvit.parallel.engine import Engine, Fragments


@dataclass(frozen=True)
class _Squares:
    """This rank's part of the squared norms of an update, [P] in the order of the parameters, on the device."""

    step: int
    of_parameters: Tensor
    of_gradients: Tensor  # as clipped
    result: StepResult


class Norms:
    """Measures norms at steps that `is_due`. Every rank has one and makes the same calls.

    Each engine stores gradients in its own way, but all give AdamW's first moment: m' = b m + (1 - b) g yields the
    clipped gradient g. That takes a copy of this rank's part of m, in host memory, during the update.
    """

    def __init__(self, engine: Engine, optim: OptimConfig, is_due: Callable[[int], bool]):
        self._engine, self._beta, self._clip_norm, self._is_due = engine, optim.betas[0], optim.clip_norm, is_due
        self._names = [name for name, _ in engine.module.named_parameters()]
        self._squares: _Squares | None = None

    def measure(self, step: int, update: Callable[[], StepResult]) -> StepResult:
        """Do the update that follows `step` finished ones, and measure it if it is due."""
        if not self._is_due(step + 1):
            return update()
        before = {name: part.data.to("cpu", copy=True) for name, part in self._engine.fragments()[EXP_AVG].items()}
        result = update()
        fragments = self._engine.fragments()
        beta = self._beta

        def gradient(name: str, moment: Tensor) -> Tensor:
            return (moment - beta * before[name].to(moment.device)) / (1 - beta)

        of_parameters = self._sum_squares(fragments[MODEL], lambda name, data: data)
        self._squares = _Squares(step + 1, of_parameters, self._sum_squares(fragments[EXP_AVG], gradient), result)
        return result

    def log(self, metrics: MetricLogger) -> None:
        """Log the norms that were measured since the last call. Waits for the other ranks."""
        found, self._squares = self._squares, None
        if found is None:
            return
        norms = {"parameter_norms": self._total(found.of_parameters)}
        if found.result.applied.item():
            clip = min(1.0, self._clip_norm / (found.result.grad_norm.item() + 1e-6)) if self._clip_norm else 1.0
            norms["gradient_norms"] = self._total(found.of_gradients) / clip
        for kind, values in norms.items():
            metrics.log_norms(found.step, kind, self._by_stage(values))

    @torch.no_grad()
    def _sum_squares(self, fragments: Fragments, read: Callable[[str, Tensor], Tensor]) -> Tensor:
        """Sum the squares of this rank's part of each parameter, [P] on the device; only the first replica counts."""
        device = self._engine.world.device
        squares = torch.zeros(len(self._names), dtype=torch.float32, device=device)
        for place, name in enumerate(self._names):
            if name in fragments and fragments[name].replica == 0:
                squares[place] = read(name, fragments[name].data).square().sum().to(device)
        return squares

    def _total(self, squares: Tensor) -> npt.NDArray[np.float64]:
        return self._engine.world.sum(squares).double().sqrt().cpu().numpy()

    def _by_stage(self, norms: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
        stages: dict[str, list[float]] = defaultdict(list)
        for name, norm in zip(self._names, norms.tolist(), strict=True):
            parts = name.split(".")
            stages[".".join(parts[:2]) if parts[0] == "stages" else parts[0]].append(norm)
        return {stage: np.array(values) for stage, values in stages.items()}
