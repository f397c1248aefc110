"""Every collective of a run passes through the wrapped methods, whichever PyTorch is installed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gcvit.monitoring.process_group_hooks import STREAM_WAITS, wrap_collectives

pytestmark = pytest.mark.gpu
# What engines and `World` call. Of each the call waits for the result, or returns what is waited for.
COLLECTIVES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "all_reduce": lambda x, y: dist.all_reduce(x),
    "broadcast": lambda x, y: dist.broadcast(x, src=0),
    "reduce": lambda x, y: dist.reduce(x, dst=0),
    "all_gather": lambda x, y: dist.all_gather([y], x),
    "all_gather_into_tensor": lambda x, y: dist.all_gather_into_tensor(y, x),
    "reduce_scatter": lambda x, y: dist.reduce_scatter(y, [x]),
    "reduce_scatter_tensor": lambda x, y: dist.reduce_scatter_tensor(y, x),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_is_issued_and_awaited_through_the_wrappers(name, world):
    calls: list[str] = []

    def note(kind: str) -> Callable[[Callable[[], Any]], Any]:
        def run(call: Callable[[], Any]) -> Any:
            calls.append(kind)
            return call()

        return run

    x, y = torch.ones(3, device=world.device), torch.zeros(3, device=world.device)
    has_streams = world.device.type == "cuda"
    with wrap_collectives(issuing=note("issued"), waiting=note("awaited"), has_streams=has_streams):
        COLLECTIVES[name](x, y)
    assert calls.count("issued") == 1
    if not has_streams:  # on a GPU the wait may be a stream's, from C++
        assert calls[-1] == "awaited"
    before = list(calls)
    COLLECTIVES[name](x, y)
    assert calls == before, "a method is still wrapped"
    assert x.tolist() == [1, 1, 1]


def test_streams_have_the_methods_that_wait():
    assert set(STREAM_WAITS) <= vars(torch.cuda.Stream).keys()


def test_process_groups_of_gloo_support_no_hooks_of_pytorch(world):
    """With them the wrappers could go."""
    assert not world.host_group.supports_completion_hooks
