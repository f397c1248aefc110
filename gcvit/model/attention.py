"""Window attention, local and global: each window of a map attends within itself.

Shape letters: B images, H and W map sides, C channels, w window side, n windows of an image, N = w*w tokens
of a window, h heads, d channels of a head. Windows are image-major: the n windows of image 0 come first.
"""

import torch
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T + bias) v.

    q (B, n or 1, h, N, d), k and v (B, n, h, N, d), bias (h, N, N); returns (B, n, h, N, d) in v's dtype.
    Written to be obviously right: this is what every faster attention is compared with.
    """
    scores = (q * scale) @ k.transpose(-2, -1) + bias
    # In bf16 the sum over N weights would lose the small ones, so the softmax never runs below fp32.
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights.to(v.dtype) @ v


def expand_bias_table(table_lh: Tensor, window: int) -> Tensor:
    """Relative-position bias of every (query, key) pair of a window: table ((2w-1)^2, h) to (h, N, N).

    Row (yi - yj + w - 1) * (2w - 1) + (xi - xj + w - 1) holds the bias of query (yi, xi) and key (yj, xj).
    """
    # The usual gather needs an N*N index (8 MB a block at w = 32) that must survive building on meta, and its
    # gradient adds with atomics. The same pairs are sliding windows over the table: a window at offset s
    # holds rows s + yi, and s = w - 1 - yj. No buffer, and a gradient summed in a fixed order.
    num_offsets = 2 * window - 1
    table_yxh = table_lh.view(num_offsets, num_offsets, -1)
    slices = table_yxh.unfold(0, window, 1).unfold(1, window, 1)  # (offset y, offset x, h, yi, xi)
    return slices.flip(0, 1).permute(2, 3, 4, 0, 1).reshape(-1, window**2, window**2)


def split_windows(x_bhwc: Tensor, window: int, num_heads: int, num_parts: int) -> Tensor:
    """Cut a map (B, H, W, parts*C) into windows and heads: (parts, B, n, h, N, d), in one copy."""
    num_images, height, width, _ = x_bhwc.shape
    x = x_bhwc.reshape(
        num_images, height // window, window, width // window, window, num_parts, num_heads, -1
    )  # (B, rows, w, columns, w, parts, h, d)
    x = x.permute(5, 0, 1, 3, 6, 2, 4, 7)
    num_windows = (height // window) * (width // window)
    return x.reshape(num_parts, num_images, num_windows, num_heads, window**2, -1)


def merge_windows(x_bnhtd: Tensor, window: int, height: int, width: int) -> Tensor:
    """Put windows and heads back into a map: (B, n, h, N, d) to (B, H, W, h*d), in one copy."""
    num_images, _, num_heads, _, _ = x_bnhtd.shape
    x = x_bnhtd.reshape(num_images, height // window, width // window, num_heads, window, window, -1)
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(num_images, height, width, -1)


def share_queries(queries_bwwc: Tensor, num_heads: int) -> Tensor:
    """Global queries (B, w, w, C) as (B, 1, h, N, d): the axis of size 1 gives all windows of an image its
    own.

    Broadcasting over that axis cannot mix images. Tiling the queries along the batch can: repeated
    image-minor (0,1,0,1) against image-major windows (0,0,1,1), they attend with a neighbour's queries from
    two images on.
    """
    num_images, window, _, num_channels = queries_bwwc.shape
    queries = queries_bwwc.reshape(num_images, 1, window**2, num_heads, num_channels // num_heads)
    return queries.transpose(2, 3)


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with queries of its own or with the stage's global queries.

    `qkv` makes queries, keys and values for local attention, keys and values alone for global attention.
    """

    def __init__(self, dim: int, num_heads: int, window: int, uses_global_queries: bool):
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.uses_global_queries = uses_global_queries
        # The published models hold d^-0.5 in fp32. Rounding it so changes nothing in fp32 or below, and is
        # the difference between 5e-9 and 1e-15 when a float64 run is compared with theirs.
        self.scale = torch.tensor((dim // num_heads) ** -0.5, dtype=torch.float32, device="cpu").item()
        self.num_parts = 2 if uses_global_queries else 3
        self.bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        self.qkv = nn.Linear(dim, self.num_parts * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_bhwc: Tensor, queries_bwwc: Tensor) -> Tensor:
        """(B, H, W, C) to the same; the window divides H and W. Local attention ignores the queries."""
        parts = split_windows(self.qkv(x_bhwc), self.window, self.num_heads, self.num_parts).unbind(0)
        q, k, v = (share_queries(queries_bwwc, self.num_heads), *parts) if self.uses_global_queries else parts
        out = attend(q, k, v, expand_bias_table(self.bias_table, self.window), self.scale)
        return self.proj(merge_windows(out, self.window, *x_bhwc.shape[1:3]))
