"""Window attention against definitions written with loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gcvit.errors import UserError
from gcvit.model import attention as module
from gcvit.model.attention import (
    WindowAttention,
    attend,
    attend_fused,
    expand_apart,
    expand_bias_table,
    merge_windows,
    share_queries,
    split_windows,
)


@given(window=st.integers(1, 8), num_heads=st.integers(1, 3))
def test_bias_table_is_expanded_by_relative_position(window: int, num_heads: int) -> None:
    num_offsets = 2 * window - 1
    table = torch.arange(num_offsets**2 * num_heads).view(num_offsets**2, num_heads)
    bias = expand_bias_table(table, window)
    positions = [(y, x) for y in range(window) for x in range(window)]
    rows = torch.tensor(
        [[(yi - yj + window - 1) * num_offsets + xi - xj + window - 1 for yj, xj in positions] for yi, xi in positions]
    )
    assert torch.equal(bias, table[rows].permute(2, 0, 1))


def test_bias_gradient_counts_every_pair_once() -> None:
    table = torch.zeros(9, 1, requires_grad=True)
    expand_bias_table(table, 2).sum().backward()
    # Of a 2x2 window's 16 pairs 4 have offset (0, 0), 2 each of the straight and 1 each of the diagonal ones.
    assert table.grad is not None
    assert table.grad.view(3, 3).tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]


@given(
    num_images=st.integers(1, 3),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    window=st.integers(1, 4),
    num_heads=st.integers(1, 2),
)
def test_windows_split_and_merge(num_images: int, rows: int, columns: int, window: int, num_heads: int) -> None:
    height, width, num_channels = rows * window, columns * window, 3 * num_heads
    x = torch.arange(num_images * height * width * num_channels).view(num_images, height, width, num_channels)
    (windows,) = split_windows(x, window, num_heads, num_parts=1)
    assert torch.equal(merge_windows(windows, window, height, width), x)
    for image in range(num_images):
        for i in range(rows * columns):
            y, x0 = i // columns * window, i % columns * window
            tokens = x[image, y : y + window, x0 : x0 + window].reshape(window**2, num_heads, 3)
            assert torch.equal(windows[image, i], tokens.transpose(0, 1))


def test_queries_are_shared_within_their_image() -> None:
    queries = torch.randn(3, 2, 2, 6)
    shared = share_queries(queries, num_heads=2)
    assert shared.shape == (3, 1, 2, 4, 3)
    assert torch.equal(shared[1, 0, 1, 2], queries[1, 1, 0, 3:])


def test_attend_is_a_weighted_mean() -> None:
    q, k, v = torch.randn(3, 2, 3, 1, 4, 5, dtype=torch.float64).unbind(0)
    bias = torch.randn(1, 4, 4, dtype=torch.float64)
    out = attend(q, k, v, bias, scale=0.3)
    scores = torch.tensor([[0.3 * q[1, 2, 0, i] @ k[1, 2, 0, j] + bias[0, i, j] for j in range(4)] for i in range(4)])
    weights = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(out[1, 2, 0], weights @ v[1, 2, 0])


def test_softmax_of_bf16_runs_in_fp32() -> None:
    # 4096 equal weights of 1/4096, a thousand of them on ones: a bf16 softmax denominator would be far off.
    q, k = torch.zeros(1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 4096, 2)
    v = (torch.arange(4096) < 1024).float().view(1, 1, 1, 4096, 1)
    bias = torch.full((1, 1, 4096), 0.3)
    out = attend(*(t.bfloat16() for t in (q, k, v, bias)), scale=1.0)
    assert out.dtype == torch.bfloat16
    assert out.item() == pytest.approx(0.25, rel=4e-3)


def test_local_attention_ignores_the_queries_and_global_attention_has_no_other() -> None:
    x, queries = torch.randn(2, 4, 4, 8), torch.randn(2, 2, 2, 8)
    local, shared = (WindowAttention(8, 2, 2, uses_global_queries=u) for u in (False, True))
    assert (local.qkv.out_features, shared.qkv.out_features) == (24, 16)
    for attention in (local, shared):
        torch.nn.init.normal_(attention.bias_table)
    assert torch.equal(local(x, queries), local(x, -queries))
    assert not torch.allclose(shared(x, queries), shared(x, -queries))


def make_attention(window: int, uses_global_queries: bool, path: str = "auto") -> WindowAttention:
    """Two heads of four channels, with a bias that matters."""
    attention = WindowAttention(8, 2, window, uses_global_queries, path).double()
    torch.nn.init.normal_(attention.bias_table)
    return attention


def attend_position_by_position(attention: WindowAttention, x: Tensor, queries: Tensor) -> Tensor:
    """The definition: a position attends to those of its window that are on the map."""
    num_images, height, width, _ = x.shape
    w = attention.window
    parts = attention.qkv(x).unflatten(-1, (attention.num_parts, 2, 4))  # (B, H, W, parts, h, d)
    table = attention.bias_table.view(2 * w - 1, 2 * w - 1, 2)
    out = torch.zeros(num_images, height, width, 2, 4, dtype=x.dtype)
    for y in range(height):
        for x0 in range(width):
            top, left = y // w * w, x0 // w * w
            near = parts[:, top : top + w, left : left + w]
            own = queries[:, y - top, x0 - left].unflatten(-1, (2, 4))
            q = own if attention.uses_global_queries else parts[:, y, x0, 0]
            bias = torch.stack(
                [
                    torch.stack([table[y - top - i + w - 1, x0 - left - j + w - 1] for j in range(near.shape[2])])
                    for i in range(near.shape[1])
                ]
            )
            scores = attention.scale * torch.einsum("bhd,bijhd->bijh", q, near[..., -2, :, :]) + bias
            weights = scores.flatten(1, 2).softmax(dim=1)
            out[:, y, x0] = torch.einsum("bth,bthd->bhd", weights, near[..., -1, :, :].flatten(1, 2))
    return attention.proj(out.flatten(-2))


@given(height=st.integers(1, 7), width=st.integers(1, 7), window=st.integers(1, 4), uses_global_queries=st.booleans())
@settings(max_examples=25, deadline=None)
def test_windows_may_end_beyond_the_map(height: int, width: int, window: int, uses_global_queries: bool) -> None:
    x = torch.randn(2, height, width, 8, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(2, window, window, 8, dtype=torch.float64, requires_grad=True)
    attention = make_attention(window, uses_global_queries)
    expected = attend_position_by_position(attention, x, queries)
    wanted = [x, *([queries] if uses_global_queries else []), *attention.parameters()]
    expected_gradients = torch.autograd.grad(expected.square().sum(), wanted)
    for path in ("reference", "sdpa"):
        attention.path = path
        out = attention(x, queries)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        gradients = torch.autograd.grad(out.square().sum(), wanted)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("num_query_windows", [1, 3])
def test_fused_attention_equals_the_reference(dtype: torch.dtype, tolerance: float, num_query_windows: int) -> None:
    q = torch.randn(2, num_query_windows, 2, 9, 16, dtype=dtype)
    k, v = torch.randn(2, 2, 3, 2, 9, 16, dtype=dtype).unbind(0)
    for bias in (torch.randn(2, 9, 9, dtype=dtype), torch.randn(3, 2, 9, 9, dtype=dtype)):
        expected = attend(q.double(), k.double(), v.double(), bias.double(), 0.25)
        out = attend_fused(q, k, v, bias, 0.25)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_every_path_is_taken_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    x, queries = torch.randn(1, 4, 4, 8, dtype=torch.float64), torch.randn(1, 2, 2, 8, dtype=torch.float64)
    taken = []
    for name in ("attend", "attend_fused"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, real=real: taken.append(name) or real(*args))
    for path in ("reference", "sdpa", "auto"):
        make_attention(2, True, path)(x, queries)
    assert taken == ["attend", "attend_fused", "attend"]


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(UserError, match=r"got flash; expected: auto, reference, sdpa, triton"):
        make_attention(2, False, "flash")


def test_a_path_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HAS_TRITON", False)
    with pytest.raises(UserError, match="install triton"):
        make_attention(2, False, "triton")
    make_attention(2, False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "num_heads"), [(1, 2), (4, 3), (7, 2)])
def test_the_compilers_operator_is_the_plain_expansion(window, num_heads, dtype):
    """To the bit, gradient included: a compiled model differs by its fused kernels alone."""
    plain = torch.randn((2 * window - 1) ** 2, num_heads, dtype=dtype, requires_grad=True)
    apart = plain.detach().clone().requires_grad_()
    pairs, theirs = expand_bias_table(plain, window), expand_apart(apart, window)
    assert torch.equal(pairs, theirs)
    gradient = torch.randn_like(pairs)
    pairs.backward(gradient)
    theirs.backward(gradient)
    assert torch.equal(plain.grad, apart.grad)
    torch.library.opcheck(expand_apart, (apart, window), test_utils=("test_schema", "test_faketensor"))
