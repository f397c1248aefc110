"""Exponential moving average of the weights, cut like the engine's master weights, updated without communication."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from gcvit.errors import Preempted
from gcvit.parallel.engine import Engine, Fragments


class Ema:
    """`average = decay * average + (1 - decay) * weights` after every step, in fp32, on this rank's fragments.

    The half-life is given in samples, so that the average means the same at every global batch size. A refused update
    counts as a step: the average moves on toward weights that stayed, since asking would wait for the device.
    """

    def __init__(self, weights: Fragments, *, half_life_samples: float, global_batch_size: int):
        assert half_life_samples > 0
        self.decay = 0.5 ** (global_batch_size / half_life_samples)
        self.updates = 0
        self._weights = weights
        self.fragments = {name: replace(part, data=part.data.clone()) for name, part in weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        averages = [part.data for part in self.fragments.values()]
        weights = [part.data for part in self._weights.values()]
        torch._foreach_lerp_(averages, weights, 1 - self.decay)
        self.updates += 1

    def restart(self) -> None:
        """Begin again from the present weights (they were just loaded from elsewhere)."""
        for name, part in self._weights.items():
            self.fragments[name].data.copy_(part.data)
        self.updates = 0

    @contextmanager
    def swapped_in(self, engine: Engine) -> Iterator[None]:
        """Let the engine compute with the average; the weights wait in its place, and no second copy is made."""
        self._swap(engine)
        try:
            yield
        except Preempted:  # which all ranks raise alike
            self._swap(engine)
            raise
        # Not after another error: to refresh is a collective, and the other ranks may be inside another.
        self._swap(engine)

    def _swap(self, engine: Engine) -> None:
        self._exchange()
        engine.refresh()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, part in self._weights.items():
            average = self.fragments[name].data
            held = part.data.clone()  # of one tensor at a time
            part.data.copy_(average)
            average.copy_(held)


def all_fragments(engine: Engine, ema: Ema | None) -> dict[str, Fragments]:
    """Return what a checkpoint holds, by kind: this rank's fragments of weights, moments and EMA."""
    return engine.fragments() | ({"ema": ema.fragments} if ema else {})
