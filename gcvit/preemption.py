"""When to leave: a notice to any rank becomes an agreement of all, at the same step.

Each look begins an all-reduce of the flag on a gloo group of its own, and reads the one that the look before began:
it went on beside the training, which never waits for it.
"""

import torch
import torch.distributed as dist

from gcvit import notice
from gcvit.errors import Preempted
from gcvit.parallel.world import World


class Preemption:
    """Every rank has one and makes the same calls."""

    def __init__(self, world: World):
        self._is_alone = world.size == 1
        if not self._is_alone:
            self._group = world.new_host_group()
            self._begin()

    def look(self) -> None:
        """Errors: Preempted, on all ranks alike, where any of them had the notice at the look before."""
        if not self._is_alone:
            self._pending.wait()
        if notice.is_given() if self._is_alone else self._flag.item():
            raise Preempted("told to leave by SIGUSR1 or SIGTERM")
        if not self._is_alone:
            self._begin()

    def close(self) -> None:
        """The training is finished: a notice has no effect any more."""
        notice.ignore()
        if not self._is_alone:
            self._pending.wait()
            dist.destroy_process_group(self._group)

    def _begin(self) -> None:
        self._flag = torch.tensor([notice.is_given()], dtype=torch.int32)
        pending = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert pending is not None
        self._pending = pending
