"""Activation checkpointing: forget what a part of the model computed, and compute it again in backward."""

import functools
from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gcvit.model import GCViT


def recompute_parts(model: GCViT, mode: str) -> None:
    """Checkpoint the model's cut points in place: with mode "full" all of them, with "none" nothing.

    The cut points are the stem, query generators, blocks and downsamplers: between them nothing is stored but the
    maps that they hand on. The forward of each part is wrapped, not the module, so that names stay as they are; the
    state of the random generator is kept, so that drop path falls alike both times.
    """
    if mode == "none":
        return
    assert mode == "full", mode
    for name in model.cut_points():
        part = model.get_submodule(name)
        part.forward = functools.partial(_forward, part.forward, part)


def _forward(forward: Callable[..., Tensor], part: nn.Module, *inputs: Tensor) -> Tensor:
    if not part.training:
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False)
