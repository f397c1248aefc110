"""Draw augmented training images as the model gets them, with their target classes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from gcvit.config.schema import AugmentConfig, DataConfig
from gcvit.data.batch import Batch
from gcvit.data.source import Source
from gcvit.monitoring.metric_logger import MetricLogger
from gcvit.monitoring.writers import describe_targets

NUM_IMAGES, NUM_COLUMNS = 16, 4
_MIN_SHARE = 1.5  # times the share that label smoothing gives to every class: less is no target of its own


@dataclass(frozen=True)
class _FirstImages:
    """The first images of a batch, on the device."""

    step: int
    samples: list[int]  # numbers in the source
    images: Tensor  # float32 [n, 3, H, W], normalised
    targets: Tensor  # float32 [n, C]


class SampleGrid:
    """Copies this rank's images at steps that are due, and writes FOLDER/step_N.png and .json at the next log row."""

    def __init__(
        self,
        folder: Path,
        source: Source,
        data: DataConfig,
        augment: AugmentConfig,
        num_classes: int,
        is_due: Callable[[int], bool],
    ):
        self._folder, self._source, self._data, self._is_due = folder, source, data, is_due
        self._min_share = _MIN_SHARE * augment.label_smoothing / num_classes
        self._first: _FirstImages | None = None

    def add(self, step: int, batch: Batch, images: Tensor, targets: Tensor) -> None:
        """Copy the first images of the step that follows `step` finished ones, if it is due. Never waits."""
        if self._is_due(step + 1) and len(batch.labels):
            samples = batch.samples[:NUM_IMAGES].tolist()
            self._first = _FirstImages(step + 1, samples, images[:NUM_IMAGES].clone(), targets[:NUM_IMAGES].clone())

    def write(self, metrics: MetricLogger) -> None:
        """Write the images that were copied since the last call. Waits for the device."""
        first, self._first = self._first, None
        if first is None:
            return
        grid = lay_out(to_pixels(first.images, self._data))
        tiles = [
            {
                "key": self._source.name(sample),
                "label": self._source.classes[int(self._source.label[sample])],
                "targets": name_targets(shares, self._source.classes, self._min_share),
            }
            for sample, shares in zip(first.samples, first.targets.cpu().numpy(), strict=True)
        ]
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"step_{first.step:08d}.png"
        Image.fromarray(grid).save(path)
        path.with_suffix(".json").write_text(json.dumps(tiles, indent=1) + "\n")
        caption = "\n\n".join(f"{i}: {describe_targets(tile['targets'])}" for i, tile in enumerate(tiles))
        metrics.log_image(first.step, "samples", grid, caption)


def to_pixels(images: Tensor, data: DataConfig) -> npt.NDArray[np.uint8]:
    """Convert normalised images [n, 3, H, W] to pixels uint8 [n, H, W, 3]; the noise of erased boxes is clipped."""
    mean, std = (torch.tensor(row, device=images.device)[:, None, None] for row in (data.mean, data.std))
    return (255 * (images * std + mean)).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def lay_out(tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Join tiles [n, H, W, 3] row by row without margins; the last row is filled up with black."""
    num_columns = min(NUM_COLUMNS, len(tiles))
    num_rows = -(-len(tiles) // num_columns)
    height, width = tiles.shape[1:3]
    cells = np.zeros((num_rows * num_columns, height, width, 3), np.uint8)
    cells[: len(tiles)] = tiles
    rows = cells.reshape(num_rows, num_columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(rows).reshape(num_rows * height, num_columns * width, 3)


def name_targets(shares: npt.NDArray[np.float32], classes: Sequence[str], min_share: float) -> list[list[Any]]:
    """Return [[class, share], ...] of targets [C], the largest first, without shares up to `min_share`."""
    order = np.argsort(-shares, kind="stable")
    return [[classes[i], round(float(shares[i]), 4)] for i in order if shares[i] > min_share]
