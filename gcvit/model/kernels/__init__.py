"""Kernels written in Triton, and what they serve. Triton is loaded where they are used: the model runs without it."""

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of maps and products. Half precision needs no loss scale of its own here: sums and softmax are in fp32."""
HEAD_DIMS = (16, 32, 64)
"""Channels of a head; all published models have 32. Wider ones would leave the registers, and want other tiles."""
CAPABILITY = (8, 0)
"""The oldest GPUs that have bf16: Ampere."""


@torch.compiler.assume_constant_result  # a compiler asks once, and has no graph for it
def serve_device(device: torch.device) -> bool:
    """Whether a GPU is new enough."""
    return torch.cuda.get_device_capability(device) >= CAPABILITY
