"""Cross entropy against soft targets, summed: the engine turns sums into the mean over the global batch."""

import torch


def soft_target_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss of each sample, [B], in fp32 or better. `logits` [B, C] of any float type, `targets` rows that sum to 1."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.sum(-targets * torch.log_softmax(logits, dim=-1, dtype=dtype), dim=-1)
