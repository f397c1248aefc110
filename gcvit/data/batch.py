"""What a loader hands over: images as the host's transforms leave them, and what the device needs to know."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's share of one micro-step of training; it may be empty.

    `positions` lie within the global batch, in [0, global_batch_size); where samples are mixed, 2k and 2k+1
    are neighbours here. `erase` holds top, left, height, width (height 0: nothing) and the noise's seed.
    """

    images: Tensor  # uint8 [b, 3, H, W]
    labels: Tensor  # int64 [b]
    positions: Tensor  # int64 [b]
    erase: Tensor  # int64 [b, 5]

    def pin_memory(self) -> "Batch":
        # Only the images are worth it: the rest is a few hundred bytes.
        return Batch(self.images.pin_memory(), self.labels, self.positions, self.erase)


@dataclass(frozen=True)
class EvalBatch:
    """One rank's share of a step of evaluation, of fixed size b; where `valid` is False, a row is padding."""

    images: Tensor  # uint8 [b, 3, H, W]
    labels: Tensor  # int64 [b]
    valid: Tensor  # bool [b]
    indices: Tensor  # int64 [b], the sample's number in its source

    def pin_memory(self) -> "EvalBatch":
        return EvalBatch(self.images.pin_memory(), self.labels, self.valid, self.indices)


def empty_images(num_images: int, img_size: int) -> Tensor:
    return torch.empty((num_images, 3, img_size, img_size), dtype=torch.uint8)
