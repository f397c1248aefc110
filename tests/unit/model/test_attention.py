"""Window attention against definitions written with loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gcvit.model.attention import (
    WindowAttention,
    attend,
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
