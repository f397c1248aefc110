"""Define window attention, local and global: each window of a map attends within itself.

Windows of w x w lie from the map's top left, ceil(H / w) x ceil(W / w) of them. The last ones may end beyond the map.
The positions beyond the map do not exist: no query has them as keys, and they have no output.

Shape letters: B images, H and W map sides, C channels, w window side, n windows of an image, N = w*w tokens
of a window, h heads, d channels of a head. Windows are image-major: the n windows of image 0 come first.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcvit.errors import UserError
from gcvit.model import kernels

PATHS = ("auto", "reference", "sdpa", "triton")
HAS_TRITON = find_spec("triton") is not None


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Compute softmax(scale * q k^T + bias) v by plain PyTorch, the reference of every faster attention.

    Args:
        q: (B, n or 1, h, N, d).
        k: (B, n, h, N, d).
        v: (B, n, h, N, d).
        bias: (h, N, N) or (n, h, N, N).

    Returns:
        (B, n, h, N, d) in v's dtype.
    """
    scores = (q * scale) @ k.transpose(-2, -1)
    # In place where that rounds nothing: the scores are the largest tensor of a block, and memory traffic costs time.
    scores = scores.add_(bias) if bias.dtype == scores.dtype else scores + bias
    # In bf16 the sum over N weights would lose the small ones, so the softmax never runs below fp32.
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights.to(v.dtype) @ v


def attend_fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Compute the same as `attend` by PyTorch's scaled_dot_product_attention, whose GPU kernels keep scores on chip."""
    num_images, num_windows = k.shape[:2]
    # The kernels take one batch axis. Queries of an image's own windows merge into it as a view; shared ones cannot.
    q = q.to(v.dtype).expand(-1, num_windows, -1, -1, -1).flatten(0, 1)
    if bias.ndim == 4:
        bias = bias.expand(num_images, -1, -1, -1, -1).flatten(0, 1)
    out = F.scaled_dot_product_attention(
        q, k.flatten(0, 1), v.flatten(0, 1), attn_mask=bias.to(v.dtype).expand(len(q), -1, -1, -1), scale=scale
    )
    return out.unflatten(0, (num_images, num_windows))


def expand_bias_table(table_lh: Tensor, window: int) -> Tensor:
    """Expand a relative-position bias table ((2w-1)^2, h) to the (query, key) pairs of a window, (h, N, N).

    Row (yi - yj + w - 1) * (2w - 1) + (xi - xj + w - 1) holds the bias of query (yi, xi) and key (yj, xj).
    """
    if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
        return expand_apart(table_lh, window)
    return _pairs_of(table_lh, window).reshape(-1, window**2, window**2)


def _pairs_of(table_lh: Tensor, window: int) -> Tensor:
    """View the table as (h, yi, xi, yj, xj)."""
    # The usual gather needs an N*N index (8 MB a block at w = 32) that must survive building on meta, and its
    # gradient adds with atomics. The same pairs are sliding windows over the table: a window at offset s
    # holds rows s + yi, and s = w - 1 - yj. No buffer, and a gradient summed in a fixed order.
    num_offsets = 2 * window - 1
    table_yxh = table_lh.view(num_offsets, num_offsets, -1)
    slices = table_yxh.unfold(0, window, 1).unfold(1, window, 1)  # (offset y, offset x, h, yi, xi)
    return slices.flip(0, 1).permute(2, 3, 4, 0, 1)


@torch.library.custom_op("gcvit::expand_bias_table", mutates_args=())
def expand_apart(table_lh: Tensor, window: int) -> Tensor:
    """Wrap `expand_bias_table` as one operator that a compiler does not decompose.

    A compiler would otherwise compute the pairs again for every window of every image, inside of the softmax.
    """
    bias = table_lh.new_empty(table_lh.shape[1], window**2, window**2)
    bias.view(-1, window, window, window, window).copy_(_pairs_of(table_lh, window))
    return bias


@expand_apart.register_fake
def _(table_lh: Tensor, window: int) -> Tensor:
    return table_lh.new_empty(table_lh.shape[1], window**2, window**2)


@torch.library.custom_op("gcvit::fold_bias_gradient", mutates_args=())
def fold_apart(gradient_hnn: Tensor, window: int) -> Tensor:
    """Compute the adjoint of `expand_apart`, (h, N, N) to ((2w-1)^2, h), in the same order of sums as autograd."""
    num_heads, num_offsets = len(gradient_hnn), 2 * window - 1
    slices = gradient_hnn.view(-1, window, window, window, window).permute(3, 4, 0, 1, 2).flip(0, 1)
    rows = torch.ops.aten.unfold_backward(slices, [window, num_offsets, num_heads, window], 1, window, 1)
    table = torch.ops.aten.unfold_backward(rows, [num_offsets, num_offsets, num_heads], 0, window, 1)
    return table.reshape(-1, num_heads)


@fold_apart.register_fake
def _(gradient_hnn: Tensor, window: int) -> Tensor:
    return gradient_hnn.new_empty((2 * window - 1) ** 2, len(gradient_hnn))


def _keep_window(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    _, ctx.window = inputs


def _differentiate(ctx: Any, gradient_hnn: Tensor) -> tuple[Tensor, None]:
    return fold_apart(gradient_hnn.contiguous(), ctx.window), None


expand_apart.register_autograd(_differentiate, setup_context=_keep_window)


def split_windows(x_bhwc: Tensor, window: int, num_heads: int, num_parts: int) -> tuple[Tensor, ...]:
    """Split a map (B, H, W, parts*C) into windows and heads: each part (B, n, h, N, d). The window divides H and W."""
    num_images, height, width, _ = x_bhwc.shape
    rows, columns = height // window, width // window
    x = x_bhwc.reshape(num_images, rows, window, columns, window, num_parts, num_heads, -1)
    # Parted before the copy and not after it: the backward pass then writes all parts into one map, in one copy.
    parts = x.unbind(5)  # each (B, rows, w, columns, w, h, d)
    return tuple(
        part.permute(0, 1, 3, 5, 2, 4, 6).reshape(num_images, rows * columns, num_heads, window**2, -1)
        for part in parts
    )


def merge_windows(x_bnhtd: Tensor, window: int, height: int, width: int) -> Tensor:
    """Merge windows and heads into a map: (B, n, h, N, d) to (B, H, W, h*d), in one copy."""
    num_images, _, num_heads, _, _ = x_bnhtd.shape
    x = x_bnhtd.reshape(num_images, height // window, width // window, num_heads, window, window, -1)
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(num_images, height, width, -1)


def mask_missing(missing_yx: tuple[int, int], height: int, width: int, window: int, bias: Tensor) -> Tensor:
    """Compute the mask to add to the bias of each window: (n, 1, 1, N), -inf for keys beyond the map, else 0."""
    mask = F.pad(bias.new_zeros(1, height, width, 1), (0, 0, 0, missing_yx[1], 0, missing_yx[0]), value=float("-inf"))
    (mask_bnhtd,) = split_windows(mask, window, num_heads=1, num_parts=1)
    return mask_bnhtd[0].transpose(-2, -1)


def share_queries(queries_bwwc: Tensor, num_heads: int) -> Tensor:
    """Reshape global queries (B, w, w, C) to (B, 1, h, N, d): the axis of size 1 gives all windows of an image its own.

    Broadcasting over that axis cannot mix images. Tiling the queries along the batch can: repeated image-minor
    (0,1,0,1) against image-major windows (0,0,1,1), windows attend with a neighbour's queries from two images on.
    """
    num_images, window, _, num_channels = queries_bwwc.shape
    queries = queries_bwwc.reshape(num_images, 1, window**2, num_heads, num_channels // num_heads)
    return queries.transpose(2, 3)


def attend_windows(
    parts_bhwc: Tensor,
    queries_bwwc: Tensor | None,
    bias_table: Tensor,
    window: int,
    num_heads: int,
    scale: float,
    attend_within: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor],
) -> Tensor:
    """Attend within the windows of a map.

    Args:
        parts_bhwc: (B, H, W, parts*C): queries, keys and values; without `queries_bwwc` keys and values alone.
        queries_bwwc: Queries (B, w, w, C) for all windows of an image, or None.
        bias_table: ((2w-1)^2, h).
        attend_within: `attend` or an equivalent.

    Returns:
        (B, H, W, C).
    """
    height, width = parts_bhwc.shape[1:3]
    missing_yx = (-height % window, -width % window)
    bias = expand_bias_table(bias_table, window)
    if any(missing_yx):
        bias = bias + mask_missing(missing_yx, height, width, window, bias)
        parts_bhwc = F.pad(parts_bhwc, (0, 0, 0, missing_yx[1], 0, missing_yx[0]))
    padded_height, padded_width = parts_bhwc.shape[1:3]
    if queries_bwwc is None:
        q, k, v = split_windows(parts_bhwc, window, num_heads, num_parts=3)
    else:
        k, v = split_windows(parts_bhwc, window, num_heads, num_parts=2)
        q = share_queries(queries_bwwc, num_heads)
    out = merge_windows(attend_within(q, k, v, bias, scale), window, padded_height, padded_width)
    return out[:, :height, :width] if any(missing_yx) else out


class WindowAttention(nn.Module):
    """Apply multi-head attention within windows, with local queries or with the stage's global queries.

    `qkv` computes queries, keys and values for local attention, keys and values alone for global attention. All paths
    give the same results but for rounding.

    Args:
        path: "reference" (`attend`), "sdpa" (`attend_fused`), "triton" (our kernel) or "auto", the fastest one on the
            map's device.

    Raises:
        UserError: The path is unknown, or this machine lacks it.
    """

    def __init__(self, dim: int, num_heads: int, window: int, uses_global_queries: bool, path: str = "auto"):
        super().__init__()
        if path not in PATHS:
            raise UserError("unknown attention", got=path, expected=", ".join(PATHS))
        if path == "triton":
            if not HAS_TRITON:
                raise UserError("attention without its package", got=path, hint="install triton, or choose auto")
            # A FLOP counter must know the operators before it begins.
            import gcvit.model.kernels.window_attention  # noqa: F401
        self.num_heads, self.window, self.path = num_heads, window, path
        self.uses_global_queries = uses_global_queries
        # The published models hold d^-0.5 in fp32. Rounding it so changes nothing in fp32 or below, and is
        # the difference between 5e-9 and 1e-15 when a float64 run is compared with theirs.
        self.scale = torch.tensor((dim // num_heads) ** -0.5, dtype=torch.float32, device="cpu").item()
        self.num_parts = 2 if uses_global_queries else 3
        self.bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        self.qkv = nn.Linear(dim, self.num_parts * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_bhwc: Tensor, queries_bwwc: Tensor) -> Tensor:
        """Attend within the windows of a map (B, H, W, C), to the same shape, for any H and W.

        Local attention ignores the queries.
        """
        parts = self.qkv(x_bhwc)
        queries = queries_bwwc if self.uses_global_queries else None
        settings = (self.bias_table, self.window, self.num_heads, self.scale)
        path = self.choose_path(parts) if self.path == "auto" else self.path
        if path == "triton":
            from gcvit.model.kernels.window_attention import window_attention

            return self.proj(window_attention(parts, queries, *settings))
        return self.proj(attend_windows(parts, queries, *settings, attend_fused if path == "sdpa" else attend))

    def choose_path(self, parts_bhwc: Tensor) -> str:
        """Choose the fastest path that supports these parts."""
        if not parts_bhwc.is_cuda:
            return "reference"
        head_dim = self.proj.in_features // self.num_heads
        serves = HAS_TRITON and parts_bhwc.dtype in kernels.DTYPES and head_dim in kernels.HEAD_DIMS
        return "triton" if serves and kernels.serve_device(parts_bhwc.device) else "sdpa"
