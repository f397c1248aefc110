"""Expand the relative-position bias table to all pairs, and sum its gradient, in Triton kernels.

The pairs of a window, (query, key) for each head, are what the attention kernels read and sum: (h, PADDED, PADDED),
the N tokens of a window padded to whole tiles. window_kernels.py tells how to read a kernel.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"
# A kernel's arguments are no Python values: a Tensor arrives as a pointer, and every number as one of the chip's.

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def expand_bias(table, bias, NUM_HEADS: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Expand the table ((2w-1)^2, h) to (h, PADDED, PADDED) in units of log(2): -inf for keys of the padding.

    Gathered once per call and not by every window: the table's entries lie h apart, so that a gather touches as
    many cache lines as it reads numbers, while this buffer is read in whole lines, and by every image again.
    """
    head = tl.program_id(1)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    query, key = pair // PADDED, pair % PADDED
    exists = (query < WINDOW * WINDOW) & (key < WINDOW * WINDOW)
    offset_y = query // WINDOW - key // WINDOW + WINDOW - 1
    offset_x = query % WINDOW - key % WINDOW + WINDOW - 1
    row = offset_y * (2 * WINDOW - 1) + offset_x
    value = tl.load(table + row * NUM_HEADS + head, mask=exists, other=0.0).to(tl.float32) * LOG2_E
    value = tl.where(key < WINDOW * WINDOW, value, float("-inf"))
    tl.store(bias + head * PADDED * PADDED + pair, value.to(bias.dtype.element_ty))


@triton.jit
def fold_bias_gradient(
    d_bias, d_table, NUM_HEADS: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum the gradient of pairs (h, PADDED, PADDED) into the table's ((2w-1)^2, h): adjoint of expand_bias.

    A program sums one vertical offset of one head: a tile of (query row, horizontal offset), query column by
    query column.
    """
    head = tl.program_id(0) % NUM_HEADS
    offset_y = tl.program_id(0) // NUM_HEADS  # yi - yj + w - 1
    offset_x = tl.arange(0, 2 * BLOCK)[None, :]  # xi - xj + w - 1
    query_y = tl.arange(0, BLOCK)[:, None]
    key_y = query_y - offset_y + WINDOW - 1
    exists_y = (query_y < WINDOW) & (key_y >= 0) & (key_y < WINDOW)
    total = tl.zeros((BLOCK, 2 * BLOCK), tl.float32)
    for query_x in tl.static_range(WINDOW):
        key_x = query_x - offset_x + WINDOW - 1
        exists = exists_y & (key_x >= 0) & (key_x < WINDOW)
        query, key = query_y * WINDOW + query_x, key_y * WINDOW + key_x
        total += tl.load(d_bias + head * PADDED * PADDED + query * PADDED + key, mask=exists, other=0.0)
    column = tl.arange(0, 2 * BLOCK)
    pointers = d_table + (offset_y * (2 * WINDOW - 1) + column) * NUM_HEADS + head
    tl.store(pointers, tl.sum(total, axis=0).to(d_table.dtype.element_ty), mask=column < 2 * WINDOW - 1)
