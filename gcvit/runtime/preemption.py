"""When to leave: a notice to any rank becomes an agreement of all, at the same step.

Each look begins an all-reduce of the flag on a gloo group of its own, and reads the one that the look before began:
it went on beside the training, which never waits for it.
"""

import numpy as np
import torch
import torch.distributed as dist

from gcvit.errors import Preempted
from gcvit.runtime import signals
from gcvit.runtime.distributed import World


class Preemption:
    """Every rank has one and makes the same calls."""

    def __init__(self, world: World):
        self._is_alone = world.size == 1
        if not self._is_alone:
            self._group = world.new_host_group()
            self._begin()

    def is_agreed(self) -> bool:
        """Whether any rank had the notice at the look before; the same on all. Nobody looks again once it is true."""
        if self._is_alone:
            return signals.is_given()
        self._pending.wait()
        agreed = bool(self._flag[0])
        if not agreed:
            self._begin()
        return agreed

    def raise_if_requested(self) -> None:
        """Raise Preempted, on all ranks alike, if it is agreed."""
        if self.is_agreed():
            raise Preempted

    def close(self) -> None:
        """The training is finished: a notice has no effect any more."""
        signals.ignore()
        if not self._is_alone:
            self._pending.wait()
            dist.destroy_process_group(self._group)

    def _begin(self) -> None:
        self._flag = np.array([signals.is_given()], dtype=np.int32)
        pending = dist.all_reduce(torch.from_numpy(self._flag), op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert pending is not None
        self._pending = pending
