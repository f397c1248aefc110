"""Augmentation beside timm's: the same draws must give the same pixels, boxes, weights and targets."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from gcvit.config.schema import AugmentConfig, DataConfig, MixConfig
from gcvit.data import transforms
from gcvit.data.batch import Piece, join_pieces
from gcvit.data.decode import Box
from gcvit.data.transforms import (
    DeviceAugment,
    EvalTransform,
    TrainTransform,
    draw_erase,
    draw_mix,
    mix_pairs,
    normalize,
    preserved_generators,
    seed_sample,
    smooth_targets,
)

SIZES = [(75, 100), (100, 75), (64, 64), (40, 200), (33, 31)]


def photo(size: tuple[int, int]) -> Image.Image:
    height, width = size
    pixels = np.random.default_rng(height).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("crop_pct", [0.875, 1.0, 0.9])
@pytest.mark.parametrize("eval_resize", ["crop", "squash"])
@pytest.mark.parametrize("size", SIZES)
def test_eval_transform(size, eval_resize, crop_pct):
    data = DataConfig(crop_pct=crop_pct, eval_resize=eval_resize)
    mode = {"crop": "center", "squash": "squash"}[eval_resize]
    reference = create_transform(48, interpolation="bicubic", crop_pct=crop_pct, crop_mode=mode, use_prefetcher=True)
    assert torch.equal(EvalTransform(data, 48)(encode(photo(size))), reference(photo(size)))


class OurCrop:
    """A crop that timm draws and we cut and resize, in place of timm's."""

    def __init__(self, theirs: RandomResizedCropAndInterpolation):
        self.theirs = theirs

    def __call__(self, image: Image.Image) -> Image.Image:
        top, left, height, width = self.theirs.get_params(image, self.theirs.scale, self.theirs.ratio)
        interpolation = self.theirs.interpolation
        if isinstance(interpolation, tuple):
            interpolation = random.choice(interpolation)
        pixels = np.array(image)[top : top + height, left : left + width]
        box = Box(0, 0, height, width)
        ours = Image.fromarray(transforms._resize(pixels, box, self.theirs.size[0], interpolation.value))
        expected = image.crop((left, top, left + width, top + height))
        expected = expected.resize(self.theirs.size, Image.Resampling[interpolation.name])
        assert np.abs(np.asarray(ours, np.int16) - np.asarray(expected, np.int16)).max() <= 2
        return ours


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "augment",
    [
        AugmentConfig(),
        AugmentConfig(rand_augment="rand-m9-n3", interpolation="bicubic", hflip=0.3),
        AugmentConfig(rand_augment=None, scale=(0.5, 0.9), ratio=(0.5, 2.0), interpolation="bilinear"),
        AugmentConfig(rand_augment=None, color_jitter=0.4),
    ],
)
def test_train_transform(size, augment):
    """The same draws, a crop that differs by rounding alone, and then the same pixels."""
    data, image = DataConfig(), photo(size)
    ours = TrainTransform(augment, data, 48)
    reference = create_transform(
        48,
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.rand_augment,
        interpolation=augment.interpolation,
        mean=data.mean,
        use_prefetcher=True,
    )
    reference.transforms[0] = OurCrop(reference.transforms[0])
    with preserved_generators():
        for position in range(25):
            views, states = [], []
            for transform, shown in ((ours, encode(image)), (reference, image)):
                seed_sample(0, 0, position)
                views.append(transform(shown))
                states.append((random.random(), np.random.random(), torch.rand(1).item()))  # noqa: NPY002
            assert torch.equal(*views)
            assert states[0] == states[1]


def test_normalize():
    data = DataConfig()
    reference = create_transform(32, mean=data.mean, std=data.std)(photo((32, 32)))
    images = torch.from_numpy(np.array(photo((32, 32)).resize((36, 36), Image.Resampling.BILINEAR)))
    images = create_transform(32, use_prefetcher=True)(photo((32, 32)))
    torch.testing.assert_close(normalize(images[None], data.mean, data.std)[0], reference, rtol=0, atol=2e-6)


def test_erase_boxes():
    reference = RandomErasing(0.5, mode="const", device="cpu")
    num_erased = 0
    with preserved_generators():
        for seed in range(200):
            random.seed(seed)
            expected = reference(torch.ones(1, 32, 48))
            random.seed(seed)
            top, left, height, width, _ = draw_erase(0.5, 32, 48)
            image = torch.ones(1, 32, 48)
            image[:, top : top + height, left : left + width] = 0
            assert torch.equal(image, expected)
            num_erased += height > 0
    assert 70 < num_erased < 130


class _GlobalDraws:
    """NumPy's global generator under the names that `numpy.random.Generator` has, as timm draws from it."""

    random = staticmethod(np.random.rand)
    beta = staticmethod(np.random.beta)
    integers = staticmethod(np.random.randint)


@pytest.mark.parametrize(
    "mix", [MixConfig(), MixConfig(mixup=0), MixConfig(cutmix=0), MixConfig(prob=0.5, switch_prob=0.8)]
)
def test_mixing(mix, monkeypatch):
    """timm mixes row i of a batch with row b-1-i; ours 2k with 2k+1: the same pairs after a permutation."""
    num_rows, num_classes = 8, 5
    reference = Mixup(
        mix.mixup,
        mix.cutmix,
        prob=mix.prob,
        switch_prob=mix.switch_prob or 0.5,
        label_smoothing=0.1,
        num_classes=num_classes,
    )
    permutation = torch.tensor([0, 2, 4, 6, 7, 5, 3, 1])
    generator = torch.Generator().manual_seed(0)
    kinds = set()
    for seed in range(60):
        images = torch.randn((num_rows, 3, 20, 28), generator=generator)
        labels = torch.randint(num_classes, (num_rows,), generator=generator)
        np.random.seed(seed)  # noqa: NPY002
        expected_images, expected_targets = reference(images[permutation].clone(), labels[permutation])
        np.random.seed(seed)  # noqa: NPY002
        draw = draw_mix(_GlobalDraws(), mix, 20, 28)
        kinds.add((draw.pixel_weight < 1, draw.bottom > draw.top))
        mixed, targets = mix_pairs(images, smooth_targets(labels, num_classes, 0.1), [draw] * num_rows)
        assert torch.equal(mixed[permutation], expected_images)
        assert torch.equal(targets[permutation], expected_targets)
    assert len(kinds) >= (3 if mix.prob < 1 else 2 if mix.mixup and mix.cutmix else 1)


def test_the_whole_device_part(monkeypatch):
    """A batch of one group, its draws taken from timm's generator: normalised, mixed, targets smoothed."""
    config, data = AugmentConfig(erase_prob=0), DataConfig()
    reference = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=10)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows, no_erase = torch.arange(2), torch.zeros((2, 5), dtype=torch.int64)
    batch = join_pieces(rows, (Piece(rows, images, torch.tensor([3, 8]), no_erase, ()),))
    augment = DeviceAugment(config, data, 10, seed=0)
    monkeypatch.setattr(DeviceAugment, "_group_rng", lambda *_: _GlobalDraws())
    for seed in range(10):
        np.random.seed(seed)  # noqa: NPY002
        expected = reference(normalize(images, data.mean, data.std), batch.labels)
        np.random.seed(seed)  # noqa: NPY002
        got = augment(batch, 0, torch.device("cpu"))
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_bicubic_crops_shrink_with_a_filter():
    """A resize without antialiasing would pass every parity of draws; it cannot pass this."""
    stripes = np.zeros((256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    augment = AugmentConfig(rand_augment=None, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0)
    with preserved_generators():
        view = TrainTransform(augment, DataConfig(), 32)(encode(Image.fromarray(stripes)))
    assert view.float().std() < 10
