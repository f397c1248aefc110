"""The batches of a stream: images after the host's transforms, and what the device's transforms need."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Corruption:
    """A sample that cannot be read: its number in its source, where it is stored, and the reason."""

    sample: int
    where: str
    reason: str


@dataclass(frozen=True)
class Piece:
    """Some rows of a micro-batch, loaded by one worker.

    A tensor in transit between processes needs a file descriptor in each, so that only the images are a tensor.
    """

    rows: npt.NDArray[np.int64]  # [p], ascending
    images: Tensor  # uint8 [p, 3, H, W]
    labels: npt.NDArray[np.int64]  # [p]
    erase: npt.NDArray[np.int64]  # [p, 5]
    corrupt: tuple[Corruption, ...]  # their rows hold other samples
    samples: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # [p], numbers in the source
    seconds: Mapping[str, float] = field(default_factory=dict)  # of the worker's time, by stage

    def pin_memory(self) -> "Piece":
        # The rest is only a few hundred bytes.
        return replace(self, images=self.images.pin_memory())


@dataclass(frozen=True)
class Batch:
    """One rank's share of one micro-step of training; it may be empty.

    `positions` lie within the global batch, in [0, global_batch_size); where samples are mixed, 2k and 2k+1
    are neighbours here. `erase` holds top, left, height, width (height 0: nothing) and the noise's seed.
    """

    positions: Tensor  # int64 [b], ascending
    labels: Tensor  # int64 [b]
    erase: Tensor  # int64 [b, 5]
    pieces: tuple[Piece, ...]  # which together hold each row once
    # Seconds by stage of the workers; see `gcvit.monitoring.step_timer`.
    waited: Mapping[str, float] = field(default_factory=dict)

    def images_on(self, device: torch.device) -> Tensor:
        """Copy the images to a device, uint8 [b, 3, H, W]; the pieces are joined there, without a copy on the host."""
        if len(self.pieces) == 1:
            return self.pieces[0].images.to(device, non_blocking=True)
        images = empty_images(len(self.labels), self.pieces[0].images.shape[-1], device)
        for piece in self.pieces:
            rows = torch.from_numpy(piece.rows).to(device, non_blocking=True)
            images.index_copy_(0, rows, piece.images.to(device, non_blocking=True))
        return images

    @property
    def images(self) -> Tensor:
        return self.images_on(torch.device("cpu"))

    @property
    def corrupt(self) -> list[Corruption]:
        return [corruption for piece in self.pieces for corruption in piece.corrupt]

    @property
    def samples(self) -> npt.NDArray[np.int64]:
        """Return the numbers of the samples in their source, int64 [b]."""
        samples = np.empty(len(self.labels), dtype=np.int64)
        for piece in self.pieces:
            samples[piece.rows] = piece.samples
        return samples


def join_pieces(positions: Tensor, pieces: tuple[Piece, ...]) -> Batch:
    """Build a batch from the pieces that hold its rows."""
    labels = np.empty(len(positions), dtype=np.int64)
    erase = np.empty((len(positions), 5), dtype=np.int64)
    for piece in pieces:
        labels[piece.rows], erase[piece.rows] = piece.labels, piece.erase
    return Batch(positions, torch.from_numpy(labels), torch.from_numpy(erase), pieces)


@dataclass(frozen=True)
class EvalBatch:
    """One rank's share of a step of evaluation, of fixed size b; a row is padding if `valid` is False."""

    images: Tensor  # uint8 [b, 3, H, W]; [5b, 3, H, W] with five crops of each
    labels: Tensor  # int64 [b]
    valid: Tensor  # bool [b]
    indices: Tensor  # int64 [b], the sample's number in its source
    corrupt: tuple[Corruption, ...] = ()  # samples that are left out: their rows are padding too

    def pin_memory(self) -> "EvalBatch":
        return EvalBatch(self.images.pin_memory(), self.labels, self.valid, self.indices, self.corrupt)


def empty_images(num_images: int, img_size: int, device: torch.device | None = None) -> Tensor:
    """Allocate images, in channels-last order like those of the transforms.

    Returns:
        Uninitialized, uint8 [num_images, 3, img_size, img_size].
    """
    shape = (num_images, 3, img_size, img_size)
    return torch.empty(shape, dtype=torch.uint8, device=device, memory_format=torch.channels_last)
