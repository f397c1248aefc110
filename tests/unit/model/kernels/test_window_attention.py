"""What torch is told of the Triton attention, and when it is chosen. The kernels themselves: tests/parity/kernels/."""

import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from gcvit.errors import UserError
from gcvit.model import attention as module
from gcvit.model.attention import WindowAttention

LOCAL_AND_GLOBAL = pytest.mark.parametrize("shared", [False, True], ids=["local", "global"])


def count_flops(path: str, x: Tensor, queries: Tensor, shared: bool) -> tuple[int, int]:
    """Of the forward pass, and of the whole training step."""
    with torch.device("meta"):
        attention = WindowAttention(32, 2, 3, uses_global_queries=shared, path=path).to(x.dtype)
    with FlopCounterMode(display=False) as counter:  # it takes the formulas known by now
        out = attention(x, queries)
        num_forward = counter.get_total_flops()
        out.backward(torch.empty_like(out))
    assert out.shape == x.shape
    for tensor in (x, *([queries] if shared else []), *attention.parameters()):
        assert tensor.grad is not None
        assert (tensor.grad.shape, tensor.grad.dtype) == (tensor.shape, tensor.dtype)
    return num_forward, counter.get_total_flops()


@LOCAL_AND_GLOBAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_flops_are_those_of_the_reference(shared: bool, dtype: torch.dtype) -> None:
    """On the device without data, where kernels cannot run; windows end beyond the map."""
    x = torch.empty(2, 5, 7, 32, device="meta", dtype=dtype, requires_grad=True)
    queries = torch.empty(2, 3, 3, 32, device="meta", dtype=dtype, requires_grad=True)
    assert count_flops("triton", x, queries, shared) == count_flops("reference", x, queries, shared)


def call(dtype: torch.dtype = torch.float32, num_heads: int = 1) -> Tensor:
    from gcvit.model.kernels.window_attention import window_attention

    return window_attention(torch.zeros(1, 2, 2, 48, dtype=dtype), None, torch.zeros(9, num_heads), 2, num_heads, 1.0)


def test_what_the_kernels_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"dtype: got torch.float64; .*bfloat16.*; hint: model.attention=sdpa"):
        call(torch.float64)
    with pytest.raises(UserError, match=r"width of a head: got 8.0; expected: .*32.*; hint: model.attention=sdpa"):
        call(num_heads=2)
    monkeypatch.setitem(sys.modules, "gcvit.model.kernels.window_kernels", None)  # as where Triton is not installed
    with pytest.raises(UserError, match=r"needs the package triton.*; hint: model.attention=sdpa"):
        call()


def test_a_cpu_is_refused_where_triton_does_not_interpret() -> None:
    attention = WindowAttention(32, 1, 2, uses_global_queries=False, path="triton")
    with pytest.raises(UserError, match=r"needs a GPU, or TRITON_INTERPRET=1 .*: got tensors on cpu"):
        attention(torch.zeros(1, 2, 2, 32), torch.zeros(1, 2, 2, 32))


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from gcvit.model.kernels.window_attention import Problem

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with FakeTensorMode():
        parts = torch.empty(1, 2, 2, 48, device="cuda")
    with pytest.raises(UserError, match=r"got \(7, 5\); expected: \(8, 0\) or above; hint: model.attention=sdpa"):
        Problem(parts, None, window=2, num_heads=1).kernels  # noqa: B018


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "head_dim", "has_triton", "path"),
    [
        ("cpu", (0, 0), torch.float32, 32, True, "reference"),
        ("cuda", (8, 0), torch.bfloat16, 32, True, "triton"),
        ("cuda", (9, 0), torch.float16, 16, True, "triton"),
        ("cuda", (8, 9), torch.float32, 64, True, "triton"),
        ("cuda", (9, 0), torch.float64, 32, True, "sdpa"),
        ("cuda", (9, 0), torch.bfloat16, 8, True, "sdpa"),
        ("cuda", (9, 0), torch.bfloat16, 32, False, "sdpa"),
        ("cuda", (7, 5), torch.float16, 32, True, "sdpa"),
    ],
)
def test_auto_takes_the_kernels_where_they_serve(
    device: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    has_triton: bool,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "HAS_TRITON", has_triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    attention = WindowAttention(2 * head_dim, 2, 2, uses_global_queries=True)
    with FakeTensorMode():
        parts = torch.empty(1, 2, 2, 4 * head_dim, device=device, dtype=dtype)
    assert attention.choose_path(parts) == path
