"""Pictures of what a model is trained on: augmented images as it gets them, with the classes that they count as."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from gcvit.config.schema import Config, DataConfig
from gcvit.data.batch import Batch
from gcvit.data.source import Source
from gcvit.monitoring.metric_logger import Metrics
from gcvit.monitoring.writers import describe_targets

NUM_IMAGES, NUM_COLUMNS = 16, 4
_LEAST_SHARE = 1.5  # times what label smoothing gives to every class: less is no target of its own


@dataclass(frozen=True)
class _Taken:
    """The first images of a batch, on the device."""

    step: int
    samples: list[int]  # numbers in the source
    images: Tensor  # float32 [n, 3, H, W], normalised
    targets: Tensor  # float32 [n, C]


class Samples:
    """Keeps this rank's images at steps that are due, and writes samples/step_N.png and .json at the next row."""

    def __init__(self, config: Config, source: Source, is_due: Callable[[int], bool]):
        self._folder, self._source, self._is_due = config.run_dir / "samples", source, is_due
        self._data = config.data
        self._floor = _LEAST_SHARE * config.augment.label_smoothing / config.model.num_classes
        self._taken: _Taken | None = None

    def see(self, step: int, batch: Batch, images: Tensor, targets: Tensor) -> None:
        """Look at the first batch of the step that follows `step` finished ones; waits for nothing."""
        if self._is_due(step + 1) and len(batch.labels):
            samples = batch.samples[:NUM_IMAGES].tolist()
            self._taken = _Taken(step + 1, samples, images[:NUM_IMAGES].clone(), targets[:NUM_IMAGES].clone())

    def write(self, metrics: Metrics) -> None:
        """Write what was kept since the last call (waits for the device)."""
        taken, self._taken = self._taken, None
        if taken is None:
            return
        grid = lay_out(to_pixels(taken.images, self._data))
        tiles = [
            {
                "key": self._source.name(sample),
                "label": self._source.classes[int(self._source.label[sample])],
                "targets": name_targets(shares, self._source.classes, self._floor),
            }
            for sample, shares in zip(taken.samples, taken.targets.cpu().numpy(), strict=True)
        ]
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"step_{taken.step:08d}.png"
        Image.fromarray(grid).save(path)
        path.with_suffix(".json").write_text(json.dumps(tiles, indent=1) + "\n")
        caption = "\n\n".join(f"{i}: {describe_targets(tile['targets'])}" for i, tile in enumerate(tiles))
        metrics.log_image(taken.step, "samples", grid, caption)


def to_pixels(images: Tensor, data: DataConfig) -> npt.NDArray[np.uint8]:
    """Normalised images [n, 3, H, W] to pixels uint8 [n, H, W, 3]; noise that was put in is cut off at 0 and 255."""
    mean, std = (torch.tensor(row, device=images.device)[:, None, None] for row in (data.mean, data.std))
    return (255 * (images * std + mean)).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def lay_out(tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Tiles [n, H, W, 3] side by side without margins, row by row; what the last row lacks is black."""
    num_columns = min(NUM_COLUMNS, len(tiles))
    num_rows = -(-len(tiles) // num_columns)
    height, width = tiles.shape[1:3]
    cells = np.zeros((num_rows * num_columns, height, width, 3), np.uint8)
    cells[: len(tiles)] = tiles
    rows = cells.reshape(num_rows, num_columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(rows).reshape(num_rows * height, num_columns * width, 3)


def name_targets(shares: npt.NDArray[np.float32], classes: Sequence[str], floor: float) -> list[list[Any]]:
    """[[class, share], ...] of targets [C], the largest first, without those up to `floor`."""
    order = np.argsort(-shares, kind="stable")
    return [[classes[i], round(float(shares[i]), 4)] for i in order if shares[i] > floor]
