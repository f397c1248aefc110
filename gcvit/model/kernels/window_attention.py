"""Compute window attention in one kernel, from the (B, H, W, C) map into such a map, without scores in memory.

Equal to gcvit.model.attention's `attend` between its `split_windows` and `merge_windows`, whose shape letters are
used here. The kernels are in window_kernels.py and bias_kernels.py; this file cuts the work into programs, owns the
memory, and makes two operators known to torch (autograd, compilation, activation checkpointing, FLOP counting).

bf16, fp16 or fp32, whichever the map has; sums and softmax always in fp32. Always deterministic: sums over windows
are formed in a fixed order, without atomics.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gcvit.errors import UserError
from gcvit.model.kernels import CAPABILITY, DTYPES, HEAD_DIMS

HINT = "model.attention=sdpa"

# Tokens of a tile and warps of a program, by the bytes of a number. In half precision, tensor cores want 64 rows for
# four warps; larger tiles would leave the registers. In fp32 ordinary arithmetic does the products, and has room for
# the sums of half as many rows, by twice as many threads.
BLOCKS = {2: 64, 4: 32}
NUM_WARPS = {2: 4, 4: 8}

# Of one token's row of a head: where it is no larger, the next tile is loaded while one is computed with. What larger
# ones would need for that spills from the registers.
MAX_PREFETCHED_BYTES = 128

# How many programs a launch is cut into where one could serve many windows. More of them balance better over the
# processors; fewer keep the bias on chip for longer, and leave fewer partial sums of its gradient to be added.
# Constants, not the number of processors: sums have the same order on every GPU.
FORWARD_PROGRAMS = 4096
WHOLE_PROGRAMS = 2048
PAIRS_PROGRAMS = 1024
PAIRS_BLOCK = 1024
"""The pairs of the bias that one program expands; at most those of the smallest window with its padding."""


def window_attention(
    parts_bhwc: Tensor,
    queries_bwwc: Tensor | None,
    bias_table: Tensor,
    window: int,
    num_heads: int,
    scale: float,
) -> Tensor:
    """Compute softmax(scale * q k^T + bias) v within the windows of a map.

    The map may have any strides; it is copied only if its channels do not lie side by side. Its sides may have any
    length: positions of a window beyond the map do not exist. The computation has the parts' dtype, to which the
        queries
    are cast. The table may have another dtype, which its gradient then has.

    Args:
        parts_bhwc: For local attention (B, H, W, 3C): q, k, v in this order and each (h, d). For global attention
            (B, H, W, 2C): k and v.
        queries_bwwc: For global attention (B, w, w, C), shared by all windows of their image; for local attention None.
        bias_table: ((2w-1)^2, h), see `expand_bias_table`.

    Returns:
        (B, H, W, C) in the map's dtype.

    Raises:
        UserError: The kernels cannot run.
    """
    queries = None if queries_bwwc is None else queries_bwwc.to(parts_bhwc.dtype)
    out, _ = run_forward(parts_bhwc, queries, bias_table, window, num_heads, scale)
    return out


@dataclass(frozen=True)
class Problem:
    """Hold the sizes of one call, and the arguments that all its kernels share."""

    parts: Tensor
    queries: Tensor | None
    window: int
    num_heads: int

    @property
    def num_channels(self) -> int:
        return self.parts.shape[-1] // (3 if self.queries is None else 2)

    @property
    def num_tokens(self) -> int:
        return self.window**2

    @property
    def block(self) -> int:
        """Return the tokens of a tile."""
        return BLOCKS[self.parts.element_size()]

    @property
    def num_tiles(self) -> int:
        return math.ceil(self.num_tokens / self.block)

    @property
    def padded(self) -> int:
        """Return the tokens of a window with its padding."""
        return self.num_tiles * self.block

    @property
    def is_whole(self) -> bool:
        """Return whether a window is one tile."""
        return self.num_tiles == 1

    @property
    def num_windows(self) -> int:
        _, height, width, _ = self.parts.shape
        return math.ceil(height / self.window) * math.ceil(width / self.window)

    @property
    def constants(self) -> dict[str, int | bool]:
        """Return the compile-time arguments of the attention kernels."""
        _, height, width, _ = self.parts.shape
        head_dim = self.num_channels // self.num_heads
        return {
            "NUM_HEADS": self.num_heads,
            "HEAD_DIM": head_dim,
            "WINDOW": self.window,
            "SHARED_QUERIES": self.queries is not None,
            "RAGGED": height % self.window != 0 or width % self.window != 0,
            "PADDED": self.padded,
            "BLOCK": self.block,
            "num_warps": NUM_WARPS[self.parts.element_size()],
            "num_stages": 2 if head_dim * self.parts.element_size() <= MAX_PREFETCHED_BYTES else 1,
        }

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return parts and queries as the kernels take them. Local attention has no queries, and does not read them."""
        return self.parts, self.parts if self.queries is None else self.queries

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the height, width and strides (image, row, position) of the map."""
        return *self.parts.shape[1:3], *self.parts.stride()[:3]

    @cached_property
    def kernels(self) -> ModuleType:
        """Import `window_kernels` on first use, because the model must run without Triton.

        Raises:
            UserError: The kernels do not support the dtype, head dimension or device, or Triton is missing.
        """
        dtype, device = self.parts.dtype, self.parts.device
        if dtype not in DTYPES:
            raise UserError("attention=triton cannot compute in this dtype", got=dtype, expected=DTYPES, hint=HINT)
        head_dim = self.num_channels / self.num_heads
        if head_dim not in HEAD_DIMS:
            raise UserError("attention=triton lacks this width of a head", got=head_dim, expected=HEAD_DIMS, hint=HINT)
        try:
            from gcvit.model.kernels import window_kernels
        except ImportError as error:
            raise UserError("attention=triton needs the package triton", got=str(error), hint=HINT) from None
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if capability < CAPABILITY:
                what = "attention=triton needs a GPU of a newer compute capability"
                raise UserError(what, got=capability, expected=f"{CAPABILITY} or above", hint=HINT)
        elif not window_kernels.IS_INTERPRETED.value:
            what = "attention=triton needs a GPU, or TRITON_INTERPRET=1 in the environment from the start"
            raise UserError(what, got=f"tensors on {device}", hint=HINT)
        return window_kernels

    def expand_bias(self, table: Tensor) -> Tensor:
        """Expand the bias to (h, PADDED, PADDED), in the layout of the kernels and the map's dtype.

        In bf16 that rounds the bias as finely as q and k are rounded, and halves what every window reads.
        """
        from gcvit.model.kernels import bias_kernels

        bias = self.parts.new_empty(self.num_heads, self.padded, self.padded)
        grid = (self.padded**2 // PAIRS_BLOCK, self.num_heads)
        sizes = (self.num_heads, self.window, self.padded, PAIRS_BLOCK)
        bias_kernels.expand_bias[grid](table.contiguous(), bias, *sizes)
        return bias

    def fold_bias_gradient(self, d_bias: Tensor, d_table: Tensor) -> None:
        """Sum the pairs' gradient (h, PADDED, PADDED) into the table's."""
        from gcvit.model.kernels import bias_kernels

        grid = (self.num_heads * (2 * self.window - 1),)
        block = 1 << (self.window - 1).bit_length()  # the power of two above
        bias_kernels.fold_bias_gradient[grid](d_bias, d_table, self.num_heads, self.window, self.padded, block)

    def plan_runs(self, max_programs: int, programs_per_run: int) -> tuple[int, int, int]:
        """Group all windows into runs: images per run, runs per image (one of them is 1), number of runs."""
        num_images = self.parts.shape[0]
        num_runs = max(1, max_programs // programs_per_run)
        windows_per_run = max(1, math.ceil(num_images * self.num_windows / num_runs))
        if windows_per_run < self.num_windows:
            runs_per_image = math.ceil(self.num_windows / windows_per_run)
            return 1, runs_per_image, num_images * runs_per_image
        images_per_run = windows_per_run // self.num_windows
        return images_per_run, 1, math.ceil(num_images / images_per_run)


def make_problem(parts: Tensor, queries: Tensor | None, window: int, num_heads: int) -> Problem:
    """Describe the call for the kernels, with contiguous channels and contiguous queries."""
    parts = parts if parts.stride(-1) == 1 else parts.contiguous()
    return Problem(parts, None if queries is None else queries.contiguous(), window, num_heads)


@torch.library.custom_op("gcvit::window_attention", mutates_args=())
def run_forward(
    parts: Tensor, queries: Tensor | None, bias_table: Tensor, window: int, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute the attended map, and the log-sum-exp (B, n, h, N) of every query's scores in units of log(2)."""
    problem = make_problem(parts, queries, window, num_heads)
    kernels, (num_images, *_) = problem.kernels, parts.shape
    out, lse = allocate_outputs(parts, queries, bias_table, window, num_heads, scale)
    programs_per_run = problem.num_tiles * num_heads
    images_per_run, runs_per_image, num_runs = problem.plan_runs(FORWARD_PROGRAMS, programs_per_run)
    with torch.cuda.device_of(parts):  # Triton launches where the process is, not where the tensors are
        kernels.attend_windows[(num_runs * programs_per_run,)](
            *problem.inputs,
            problem.expand_bias(bias_table),
            out,
            lse,
            scale,
            num_images,
            *problem.sizes,
            images_per_run,
            runs_per_image,
            **problem.constants,
        )
    return out, lse


@run_forward.register_fake
def allocate_outputs(
    parts: Tensor, queries: Tensor | None, bias_table: Tensor, window: int, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    num_images, height, width, num_parts_channels = parts.shape
    num_windows = -(-height // window) * -(-width // window)
    out = parts.new_empty(num_images, height, width, num_parts_channels // (3 if queries is None else 2))
    return out, parts.new_empty(num_images, num_windows, num_heads, window**2, dtype=torch.float32)


@torch.library.custom_op("gcvit::window_attention_backward", mutates_args=())
def run_backward(
    d_out: Tensor,
    parts: Tensor,
    queries: Tensor | None,
    bias_table: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int,
    num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of parts, queries (an empty tensor if there are none) and bias table."""
    problem = make_problem(parts, queries, window, num_heads)
    kernels, (num_images, *_) = problem.kernels, parts.shape
    is_whole, num_tiles = problem.is_whole, problem.num_tiles
    programs_per_run = num_tiles**2 * num_heads
    max_programs = WHOLE_PROGRAMS if is_whole else PAIRS_PROGRAMS
    images_per_run, runs_per_image, num_runs = problem.plan_runs(max_programs, programs_per_run)

    d_parts = parts.new_empty(parts.shape)
    d_table = torch.empty_like(bias_table, memory_format=torch.contiguous_format)
    d_bias = parts.new_empty(num_runs, num_heads, problem.padded, problem.padded, dtype=torch.float32)
    # The shared queries' gradient is a sum over windows: in as many pieces as programs share an image.
    num_pieces = 0 if queries is None else runs_per_image if is_whole else problem.num_windows
    piece_dtype = parts.dtype if num_pieces <= 1 else torch.float32
    d_queries = parts.new_empty(num_images, num_pieces, problem.num_tokens, problem.num_channels, dtype=piece_dtype)

    with torch.cuda.device_of(parts):
        inputs = (*problem.inputs, problem.expand_bias(bias_table), out, lse, d_out.contiguous())
        kernels.backward_pairs[(num_runs * programs_per_run,)](
            *inputs,
            d_parts,
            d_queries,
            d_bias,
            scale,
            num_images,
            *problem.sizes,
            images_per_run,
            runs_per_image,
            **problem.constants,
        )
        if not is_whole:
            kernels.backward_tiles[(num_images * problem.num_windows * num_tiles * num_heads,)](
                *inputs, d_parts, d_queries, scale, *problem.sizes, **problem.constants
            )
        problem.fold_bias_gradient(d_bias[0] if num_runs == 1 else d_bias.sum(0), d_table)

    if queries is None:
        return d_parts, parts.new_empty(0), d_table
    d_queries = d_queries if num_pieces == 1 else d_queries.sum(1)
    return d_parts, d_queries.to(parts.dtype).view(queries.shape), d_table


@run_backward.register_fake
def allocate_gradients(
    d_out: Tensor,
    parts: Tensor,
    queries: Tensor | None,
    bias_table: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int,
    num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    d_queries = parts.new_empty(0 if queries is None else queries.shape)
    d_table = torch.empty_like(bias_table, memory_format=torch.contiguous_format)
    return parts.new_empty(parts.shape), d_queries, d_table


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the tensors and numbers that `differentiate` needs."""
    parts, queries, bias_table, ctx.window, ctx.num_heads, ctx.scale = inputs
    ctx.save_for_backward(parts, queries, bias_table, *output)


def differentiate(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    parts, queries, *others = ctx.saved_tensors
    d_parts, d_queries, d_table = run_backward(d_out, parts, queries, *others, ctx.window, ctx.num_heads, ctx.scale)
    return d_parts, d_queries if queries is not None else None, d_table, None, None, None


run_forward.register_autograd(differentiate, setup_context=save_for_backward)


@register_flop_formula(torch.ops.gcvit.window_attention)
def count_forward_flops(*_: Any, out_shape: Any, **__: Any) -> int:
    """Count two products, as the reference does: whole windows, without the padding on chip."""
    (num_images, _, _, num_channels), (_, num_windows, _, num_tokens) = out_shape
    return 2 * 2 * num_images * num_windows * num_tokens**2 * num_channels


@register_flop_formula(torch.ops.gcvit.window_attention_backward)
def count_backward_flops(
    d_out: Any, parts: Any, queries: Any, bias_table: Any, out: Any, lse: Any, *_: Any, **__: Any
) -> int:
    """Count four products, as the reference does: recomputed scores do not count."""
    (num_images, _, _, num_channels), (_, num_windows, _, num_tokens) = out, lse
    return 4 * 2 * num_images * num_windows * num_tokens**2 * num_channels
