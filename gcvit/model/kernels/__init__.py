"""Describe what the Triton kernels support. Triton is loaded on first use: the model runs without it."""

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The types of maps and products. Sums and softmax are in fp32."""
HEAD_DIMS = (16, 32, 64)
"""The channels of a head; all published models have 32. Wider heads exceed the registers with these tiles."""
CAPABILITY = (8, 0)
"""The oldest GPUs that have bf16: Ampere."""


@torch.compiler.assume_constant_result  # a compiler asks once, and has no graph for it
def serve_device(device: torch.device) -> bool:
    """Return whether a GPU is new enough."""
    return torch.cuda.get_device_capability(device) >= CAPABILITY
