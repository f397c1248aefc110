"""Rank, world size, device and process groups, from torchrun, the deepspeed launcher or one plain process."""

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
    """The process group, seen by one of its ranks."""

    rank: int
    size: int
    device: torch.device
    host_group: dist.ProcessGroup  # gloo: small objects must not queue behind kernels
    timeout: timedelta | None = None  # of a collective; None for PyTorch's default

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: T) -> T:
        """Return rank 0's value, a small plain Python object, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def on_rank0(self, act: Callable[[], T]) -> T:
        """Call `act()` on rank 0, and return its result on every rank.

        Raises:
            UserError: on every rank, if `act()` raises it.
        """
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
        """Return the values of all ranks, small plain Python objects, on every rank."""
        boxes = [value] * self.size
        dist.all_gather_object(boxes, value, group=self.host_group)
        return boxes

    def gather_on_rank0(self, value: T) -> list[T]:
        """Every rank's value on rank 0, nothing on the others: for what would be much on every rank."""
        boxes = [value] * self.size if self.is_rank0 else None
        dist.gather_object(value, boxes, group=self.host_group)
        return boxes or []

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier(group=self.host_group)

    def new_host_group(self) -> dist.ProcessGroup:
        """Create a group like `host_group` for a thread or component that has its own collectives.

        Every rank must call it.
        """
        return _new_host_group(self.timeout)


def _new_host_group(timeout: timedelta | None) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


@contextmanager
def join_world(deterministic: bool = False, hang_timeout: float | None = None) -> Iterator[World]:
    """Initialize the process group that the environment names, and destroy it at the end of the block.

    torchrun and the deepspeed launcher set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*. Without them this process is
    a world of one. It has a process group too, which FSDP2 and DeepSpeed require.

    Args:
        deterministic: Use kernels that give the same bits in every run, and fail at an operation that has none.
        hang_timeout: Seconds without progress after which a watchdog ends this process. Collectives may wait for
            longer, because the watchdog prints stacks and a collective's timeout does not.

    Raises:
        UserError: if this node has more processes than GPUs.
    """
    # By default PyTorch rounds the inputs of fp32 convolutions to 10 bits of mantissa. Its matrix products are exact.
    torch.backends.cudnn.allow_tf32 = False
    if deterministic:
        # cuBLAS reads it at the first product. With a fixed workspace it does not choose kernels by free memory.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        # PyTorch would also fill new memory with NaN, which costs time. Nothing here reads memory before writing it.
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
        # Not after an error: destroying the group would wait for ranks that are inside a collective.
        dist.destroy_process_group()
