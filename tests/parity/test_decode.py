"""Crops that are decoded in part and resized by torch, beside timm's of the whole image, resized by Pillow."""

import io
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform

from gcvit.config.schema import AugmentConfig, DataConfig
from gcvit.data import transforms
from gcvit.data.decode import decode
from gcvit.data.transforms import TrainTransform, preserved_generators, seed_sample

IMG_SIZE = 224
NUM_DRAWS = 8
MAX_DIFFERENCE = 2.5  # of 255: the mean over an image's pixels, for 99 of 100 images
WIDTHS = [300, 500, 700, 1400, 3000]
QUALITIES = [75, 95]
CHROMA = ["4:2:0", "4:4:4"]


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    """Two photographs at all widths, qualities and resolutions of chroma, as JPEGs."""
    contents = []
    for pixels, width in itertools.product(load_sample_images().images, WIDTHS):
        photo = Image.fromarray(pixels)
        photo = photo.resize((width, photo.height * width // photo.width), Image.Resampling.LANCZOS)
        for quality, chroma in itertools.product(QUALITIES, CHROMA):
            file = io.BytesIO()
            photo.save(file, "JPEG", quality=quality, subsampling=chroma)
            contents.append(file.getvalue())
    return contents


def differences(photos: list[bytes], interpolation: str) -> list[float]:
    """Mean absolute difference between ours and timm's view, one for each photo and draw."""
    augment = AugmentConfig(rand_augment=None, interpolation=interpolation)
    ours = TrainTransform(augment, DataConfig(), IMG_SIZE)
    theirs = create_transform(
        IMG_SIZE, is_training=True, color_jitter=None, interpolation=interpolation, use_prefetcher=True
    )
    found = []
    with preserved_generators():
        for number, content in enumerate(photos):
            whole = decode(content)
            for draw in range(NUM_DRAWS):
                seed_sample(number, 0, draw)
                expected = theirs(whole)
                seed_sample(number, 0, draw)
                found.append(float((ours(content).float() - expected.float()).abs().mean()))
    return found


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_are_timms(photos, interpolation):
    found = differences(photos, interpolation)
    print(f"{interpolation}: median {np.median(found):.2f}, 99th percentile {np.percentile(found, 99):.2f} of 255")
    assert np.percentile(found, 99) <= MAX_DIFFERENCE


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_resize_without_antialiasing_differs(photos, interpolation, monkeypatch):
    def resize(pixels, box, size, mode):
        top, left, bottom, right = (
            round(edge) for edge in (box.top, box.left, box.top + box.height, box.left + box.width)
        )
        crop = torch.from_numpy(pixels[top:bottom, left:right].copy()).permute(2, 0, 1)[None].float()
        resized = F.interpolate(crop, (size, size), mode=mode).round().clamp(0, 255)
        return resized[0].permute(1, 2, 0).byte().numpy()

    monkeypatch.setattr(transforms, "_resize", resize)
    assert np.percentile(differences(photos[:12], interpolation), 99) > MAX_DIFFERENCE
