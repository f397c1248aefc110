"""Who am I: rank, world size and device, from torchrun, the deepspeed launcher, or one plain process."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from gcvit.errors import UserError
from gcvit.runtime.watchdog import watchdog

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, with its `device`."""

    rank: int
    size: int
    device: torch.device
    host_group: dist.ProcessGroup  # gloo: host-side words between ranks must not queue behind kernels
    timeout: timedelta | None = None  # of a collective; None is torch's

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank; a small plain Python object."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def on_rank0(self, act: Callable[[], T]) -> T:
        """What `act()` gives on rank 0, on every rank; its `UserError` too, so that all ranks stop alike."""
        outcome: T | UserError | None = None
        if self.is_rank0:
            try:
                outcome = act()
            except UserError as error:
                outcome = error
        outcome = self.broadcast(outcome)
        if isinstance(outcome, UserError):
            raise outcome
        return cast(T, outcome)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank; small plain Python objects."""
        boxes = [value] * self.size
        dist.all_gather_object(boxes, value, group=self.host_group)
        return boxes

    def barrier(self) -> None:
        dist.barrier(group=self.host_group)

    def new_host_group(self) -> dist.ProcessGroup:
        """One more like `host_group`, for another thread or purpose. Every rank calls it."""
        return _new_host_group(self.timeout)


def _new_host_group(timeout: timedelta | None) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


@contextmanager
def join_world(deterministic: bool = False, hang_timeout: float | None = None) -> Iterator[World]:
    """Start the process group named by the environment, and leave it in the end.

    torchrun and the deepspeed launcher set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*; without them this process is
    a world of one (which still has a process group: FSDP2 and DeepSpeed want one). With `deterministic` it takes
    kernels that give the same bits in every run, and fails at an operation that has none. With `hang_timeout`, in
    seconds, a watchdog ends it where it hangs; collectives may wait for longer, since its stacks tell more than they.
    """
    # PyTorch's default for convolutions of fp32, which it would round to 10 bits; its products are exact by default.
    torch.backends.cudnn.allow_tf32 = False
    if deterministic:
        # Read when the first product is launched: with a workspace of its own, cuBLAS does not choose by what is free.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        # It would also fill all new memory with NaN, which costs time: nothing here reads what it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                "more processes than GPUs on this node",
                got=f"local rank {local_rank}",
                expected=f"{torch.cuda.device_count()} GPUs",
                hint="start one process per GPU",
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    timeout = None if hang_timeout is None else timedelta(seconds=5 * hang_timeout + 600)
    with watchdog(hang_timeout):
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout, device_id=device_id)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device_id)
        yield World(rank, size, device, _new_host_group(timeout), timeout)
        # Not after an error: the other ranks may be inside a collective, and leaving the group would wait for them.
        dist.destroy_process_group()
