"""Average the weights exponentially, sharded like the engine's master weights, without communication."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from gcvit.errors import Preempted
from gcvit.parallel.engine import Engine, Fragments


class Ema:
    """`average = decay * average + (1 - decay) * weights` after every step, in fp32, on this rank's fragments.

    The half-life is in samples, so that it does not depend on the global batch size. A refused update counts as a step:
    the average moves toward the unchanged weights, since reading the result would wait for the device.
    """

    def __init__(self, weights: Fragments, *, half_life_samples: float, global_batch_size: int):
        assert half_life_samples > 0
        self.decay = 0.5 ** (global_batch_size / half_life_samples)
        self.updates = 0
        self._weights = weights
        self.fragments = {name: replace(part, data=part.data.clone()) for name, part in weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average toward the present weights by one step."""
        averages = [part.data for part in self.fragments.values()]
        weights = [part.data for part in self._weights.values()]
        torch._foreach_lerp_(averages, weights, 1 - self.decay)
        self.updates += 1

    def restart(self) -> None:
        """Restart from the present weights, after they were loaded from elsewhere."""
        for name, part in self._weights.items():
            self.fragments[name].data.copy_(part.data)
        self.updates = 0

    @contextmanager
    def swapped_in(self, engine: Engine) -> Iterator[None]:
        """Swap the average with the engine's weights while inside, without a second copy."""
        self._swap(engine)
        try:
            yield
        except Preempted:  # all ranks raise it alike
            self._swap(engine)
            raise
        # Not after another error: refreshing is a collective, and the other ranks may be inside another one.
        self._swap(engine)

    def _swap(self, engine: Engine) -> None:
        self._exchange()
        engine.refresh()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, part in self._weights.items():
            average = self.fragments[name].data
            weights = part.data.clone()  # one tensor at a time
            part.data.copy_(average)
            average.copy_(weights)


def all_fragments(engine: Engine, ema: Ema | None) -> dict[str, Fragments]:
    """Return what a checkpoint holds, by kind: this rank's fragments of weights, moments and EMA."""
    return engine.fragments() | ({"ema": ema.fragments} if ema else {})
