"""Wrap the calls in which a thread starts or awaits a collective. Written for PyTorch 2.15.

PyTorch has hooks on process groups (`register_pre_hook`), but gloo and NCCL groups support none of them, and it has no
hook on waits. So the methods of its classes are replaced while a block runs.
`tests/unit/monitoring/test_process_group_hooks.py` fails if PyTorch sends a collective through another method.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

# DDP sends its gradients from C++, which calls none of them.
ISSUING = (
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "allgather", "all_gather_single", "_allgather_base"),
    *("reduce_scatter", "reduce_scatter_single", "_reduce_scatter_base", "allgather_into_tensor_coalesced"),
)
"""Methods of `ProcessGroup` that start a collective. Releases before 2.15 lack some of them."""
STREAM_WAITS = ("wait_event", "wait_stream")
"""Methods of `torch.cuda.Stream` that make a stream wait for another."""

Around = Callable[[Callable[[], Any]], Any]
"""Run a call, which takes no arguments, and return its result; time it, for example."""


@contextmanager
def wrap_collectives(*, issuing: Around, waiting: Around, has_streams: bool) -> Iterator[None]:
    """Run calls that start a collective through `issuing`, and calls that await one through `waiting`.

    Blocks may lie within each other. Other threads pass through the same wrappers.

    Args:
        issuing: Runs a call of a method of `ISSUING`.
        waiting: Runs a call of `Work.wait`, and of `STREAM_WAITS` if `has_streams`.
        has_streams: Whether ranks compute on GPUs, where a stream waits and not the host.
    """
    chosen: list[tuple[type, str, Around]] = [
        (dist.ProcessGroup, name, issuing) for name in ISSUING if name in vars(dist.ProcessGroup)
    ]
    chosen.append((dist.Work, "wait", waiting))
    if has_streams:
        chosen += [(torch.cuda.Stream, name, waiting) for name in STREAM_WAITS]
    with ExitStack() as stack:
        for owner, name, around in chosen:
            # `getattr` gives a method that is no longer bound to its object once it is put back.
            stack.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, _wrap(getattr(owner, name), around))
        yield


def _wrap(method: Callable[..., Any], around: Around) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        return around(lambda: method(*arguments, **options))

    return call
