"""Count the floating-point operations of a model, for its model FLOPs utilization (MFU)."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from gcvit.model.gcvit import read_sides

TRAINING_PASSES = 3
"""The cost of a training step in forward passes: backward has two products for each one of forward. Recomputing is not
counted."""


def count_forward_flops(model: nn.Module, img_size: int | Sequence[int]) -> int:
    """Count the FLOPs of one image's forward pass: two for each multiply-add of matrix products and convolutions.

    The model may be on any device and in training mode, in which drop path is not subtracted. It is not changed, and
    nothing is computed. Count a model before an engine shards it, which changes its shapes.

    Args:
        img_size: In pixels: one number, or height and width.

    Returns:
        FLOPs, a whole number.
    """
    weights = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    weight = next(model.parameters())
    image = torch.empty(1, 3, *read_sides(img_size), dtype=weight.dtype, device="meta")
    was_training = model.training
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            functional_call(model.eval(), weights, (image,))
    finally:
        model.train(was_training)
    return int(counter.get_total_flops())
