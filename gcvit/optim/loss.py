"""Compute the cross entropy against soft targets. Engines turn its sum into the mean over the global batch."""

import torch


def soft_target_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the loss of each sample.

    Args:
        logits: [B, C], of any floating-point type.
        targets: [B, C], rows that sum to 1.

    Returns:
        [B], in fp32 or better.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.sum(-targets * torch.log_softmax(logits, dim=-1, dtype=dtype), dim=-1)
