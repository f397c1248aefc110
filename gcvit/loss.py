"""Cross entropy against soft targets, summed: the engine turns sums into the mean over the global batch."""

import torch


def soft_target_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss of each sample, [B], in fp32. `logits` [B, C] of any float type, `targets` [B, C] rows that sum to 1."""
    return torch.sum(-targets * torch.log_softmax(logits.float(), dim=-1), dim=-1)
