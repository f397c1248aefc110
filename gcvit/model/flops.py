"""Floating-point operations of a model, counted and not measured: what a share of a GPU's peak (MFU) is taken of."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from gcvit.model.gcvit import read_sides

TRAINING_PASSES = 3
"""A training step in forward passes: backward has two products for each of forward's. Recomputing is not counted."""


def count_forward_flops(model: nn.Module, img_size: int | Sequence[int]) -> int:
    """FLOPs of one image's forward pass: two for each multiply-add of matrix products and convolutions.

    The model may lie anywhere and may be in training, in which drop path counts nothing off; it is left as it is, and
    nothing is computed. One that an engine has sharded has not its shapes any more: count it before. `img_size` is
    one number, or height and width, in pixels.
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
