"""Agree among the ranks when to stop: a preemption signal to any rank stops all ranks at the same step.

Each poll starts an all-reduce of the flag on a gloo group of its own, and reads the result of the all-reduce that the
previous poll started. That one ran beside the training step, so the training does not wait for it.
"""

import numpy as np
import torch
import torch.distributed as dist

from gcvit.errors import Preempted
from gcvit.runtime import signals
from gcvit.runtime.distributed import World


class Preemption:
    """Poll the preemption flag of all ranks. Every rank makes the same calls."""

    def __init__(self, world: World):
        self._is_alone = world.size == 1
        if not self._is_alone:
            self._group = world.new_host_group()
            self._begin()

    def is_agreed(self) -> bool:
        """Return whether any rank had received a signal by the previous poll: the same on all ranks.

        Once it returns True, do not call it again.
        """
        if self._is_alone:
            return signals.is_received()
        self._pending.wait()
        agreed = bool(self._flag[0])
        if not agreed:
            self._begin()
        return agreed

    def raise_if_requested(self) -> None:
        """Poll, and stop if a signal has arrived.

        Raises:
            Preempted: on all ranks, if any rank had received a signal by the previous poll.
        """
        if self.is_agreed():
            raise Preempted

    def close(self) -> None:
        """Stop polling after the last step: a signal has no effect from here on."""
        signals.ignore_signals()
        if not self._is_alone:
            self._pending.wait()
            dist.destroy_process_group(self._group)

    def _begin(self) -> None:
        self._flag = np.array([signals.is_received()], dtype=np.int32)
        pending = dist.all_reduce(torch.from_numpy(self._flag), op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert pending is not None
        self._pending = pending
