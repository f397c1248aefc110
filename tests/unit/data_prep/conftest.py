"""A small class-folder tree for the tests of data_prep."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def encode_image(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.RandomState(seed).randint(0, 256, (9, 11, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def make_image() -> Callable[..., bytes]:
    return encode_image


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Classes a, b, c with 5, 4, 3 images; one of them a PNG that calls itself JPEG."""
    root = tmp_path / "tree"
    for label, name in enumerate("abc"):
        (root / name).mkdir(parents=True)
        for i in range(5 - label):
            kind = "PNG" if (name, i) == ("b", 0) else "JPEG"
            (root / name / f"{i}.jpg").write_bytes(encode_image(10 * label + i, kind))
    return root
