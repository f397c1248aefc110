"""Sample pictures: the tiles are what the model got, and the targets what its loss took, with and without mixing."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from gcvit.config.load import load_config
from gcvit.config.schema import Config
from gcvit.data.batch import Batch, Piece, join_pieces
from gcvit.data.transforms import DeviceAugment
from gcvit.monitoring.sample_grid import NUM_IMAGES, SampleGrid, lay_out, name_targets
from tests.helpers.launching import ROOT

CLASSES = ("cat", "dog", "owl", "fox")
SIZE = 8


class Source:
    """Its sample n is of class n % 4."""

    classes = CLASSES
    label = np.arange(100) % len(CLASSES)

    def name(self, index: int) -> str:
        return f"image_{index}"


class Shown(list):
    """Stands for `MetricLogger`."""

    def log_image(self, *what) -> None:
        self.append(what)


def build_grid(config: Config, is_due: Callable[[int], bool]) -> SampleGrid:
    folder = config.run_dir / "samples"
    return SampleGrid(folder, Source(), config.data, config.augment, config.model.num_classes, is_due)


def make_batch(num_images: int) -> Batch:
    """Noise, in two pieces, of which the first has the odd rows."""
    random = np.random.default_rng(num_images)
    numbers = random.permutation(100)[:num_images]
    pieces = []
    for rows in (np.arange(1, num_images, 2), np.arange(0, num_images, 2)):
        images = torch.from_numpy(random.integers(0, 256, (len(rows), 3, SIZE, SIZE), dtype=np.uint8))
        erase = np.zeros((len(rows), 5), np.int64)
        pieces.append(Piece(rows, images, Source.label[numbers[rows]], erase, (), numbers[rows]))
    return join_pieces(torch.arange(num_images), tuple(pieces))


@pytest.mark.parametrize("mix", ["{mixup: 0.8, cutmix: 1.0, group_size: 2}", "null"])
@pytest.mark.parametrize("num_images", [6, NUM_IMAGES + 2])
def test_pictures_show_what_the_model_got(num_images, mix, tmp_path):
    config, _ = load_config(ROOT / "tests/helpers/golden.yaml", [f"output_dir={tmp_path}", f"augment.mix={mix}"])
    config.run_dir.mkdir()
    batch, shown = make_batch(num_images), Shown()
    augment = DeviceAugment(config.augment, config.data, num_classes=len(CLASSES), seed=0)
    images, targets = augment.augment(batch.images.clone(), batch, step=6)
    got = images.clone()

    samples = build_grid(config, lambda step: step == 7)
    samples.add(5, batch, torch.zeros_like(images), targets)  # is not due
    samples.add(6, batch, images, targets)
    images.zero_()  # later steps may write there
    samples.write(shown)
    samples.write(shown)  # shows it once

    num_shown = min(num_images, NUM_IMAGES)
    folder = config.run_dir / "samples"
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000007.json", "step_00000007.png"]
    grid = np.asarray(Image.open(folder / "step_00000007.png"))
    assert grid.shape == (-(-num_shown // 4) * SIZE, 4 * SIZE, 3)
    mean, std = (np.array(row)[:, None, None] for row in (config.data.mean, config.data.std))
    for i in range(num_shown):
        top, left = i // 4 * SIZE, i % 4 * SIZE
        pixels = (got[i].numpy() * std + mean).clip(0, 1).transpose(1, 2, 0) * 255
        assert np.abs(grid[top : top + SIZE, left : left + SIZE] - pixels).max() < 0.51

    tiles = json.loads((folder / "step_00000007.json").read_text())
    assert [tile["key"] for tile in tiles] == [f"image_{n}" for n in batch.samples[:num_shown]]
    assert [tile["label"] for tile in tiles] == [CLASSES[n % 4] for n in batch.samples[:num_shown]]
    for tile, shares in zip(tiles, targets.tolist(), strict=False):
        # What smoothing spreads, 0.1 / 4, is no target: the others are those of the image and its partner.
        wanted = {name: share for name, share in zip(CLASSES, shares, strict=True) if share > 0.1 / 4 + 1e-6}
        assert dict(tile["targets"]) == {name: pytest.approx(share, abs=1e-4) for name, share in wanted.items()}
        if mix == "null":
            assert [name for name, _ in tile["targets"]] == [tile["label"]]
    assert mix == "null" or any(len(tile["targets"]) == 2 for tile in tiles)
    ((step, name, image, caption),) = shown
    assert (step, name, caption.count("%")) == (7, "samples", sum(len(tile["targets"]) for tile in tiles))
    np.testing.assert_array_equal(image, grid)


def test_a_rank_without_samples_shows_none(tmp_path):
    config, _ = load_config(ROOT / "tests/helpers/golden.yaml", [f"output_dir={tmp_path}"])
    samples = build_grid(config, lambda step: True)
    samples.add(0, make_batch(0), torch.zeros(1, 3, SIZE, SIZE), torch.zeros(1, 4))  # black, without a target
    samples.write(Shown())
    assert not config.run_dir.exists()


@pytest.mark.parametrize(("num_tiles", "rows", "columns"), [(1, 1, 1), (3, 1, 3), (4, 1, 4), (5, 2, 4), (16, 4, 4)])
def test_tiles_lie_in_reading_order(num_tiles, rows, columns):
    tiles = np.broadcast_to(np.arange(1, num_tiles + 1, dtype=np.uint8)[:, None, None, None], (num_tiles, 2, 2, 3))
    grid = lay_out(tiles)
    assert grid.shape == (2 * rows, 2 * columns, 3)
    wanted = [*range(1, num_tiles + 1), *[0] * (rows * columns - num_tiles)]
    assert grid[::2, ::2, 0].flatten().tolist() == wanted


def test_two_classes_mixed_half_and_half_are_both_named():
    shares = np.array([0.5, 0.5], np.float32)
    assert name_targets(shares, ["cat", "dog"], 0.075) == [["cat", 0.5], ["dog", 0.5]]
    assert name_targets(np.array([0.05, 0.95], np.float32), ["cat", "dog"], 0.075) == [["dog", 0.95]]
