"""Clip gradients by their global norm, and update or refuse the update, without waiting for the device.

ddp and fsdp clip here; under ZeRO, DeepSpeed clips by the option `gradient_clipping` (`parallel/deepspeed_config.py`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """Hold the outcome of an update, on the device."""

    grad_norm: Tensor  # [], before clipping
    applied: Tensor  # [], 1.0, or 0.0 if the gradient was not finite and the update was refused


def global_norm(grads: Iterable[Tensor]) -> Tensor:
    """Compute the L2 norm over all tensors together: [], in fp32 or better, on their device."""
    norms = torch.stack(torch._foreach_norm([grad.detach() for grad in grads]))
    return torch.linalg.vector_norm(norms, dtype=torch.promote_types(norms.dtype, torch.float32))


def clip_and_step(
    optimizer: torch.optim.AdamW,
    grads: list[Tensor],
    norm: Tensor,
    clip_norm: float | None,
    loss_scale: Tensor | None = None,
) -> StepResult:
    """Clip `grads` in place to `clip_norm` by their global `norm`, then update, without waiting for the device.

    If `loss_scale` is given, gradients and norm are multiplied by it, and divided here. A non-finite norm reaches the
    fused AdamW as `found_inf`, the flag of gradient scaling: its kernel then changes no parameter, moment or counter.
    """
    found_inf = (~torch.isfinite(norm)).float()
    factor = None
    if loss_scale is not None:
        norm, factor = norm / loss_scale, 1.0 / loss_scale
    if clip_norm is not None:
        clip = torch.clamp(clip_norm / (norm + 1e-6), max=1.0)
        factor = clip if factor is None else clip * factor
    if factor is not None:
        torch._foreach_mul_(grads, factor)
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    optimizer.step()
    return StepResult(norm, 1.0 - found_inf)
