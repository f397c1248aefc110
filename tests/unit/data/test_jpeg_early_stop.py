"""What decoding above the last row relies on in simplejpeg and libjpeg-turbo."""

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from gcvit.data.jpeg_early_stop import announce_rows, is_early_stop
from gcvit.data.jpeg_header import START_OF_FRAME, iter_segments

HEIGHT, WIDTH = 96, 64


@pytest.fixture(scope="module")
def content() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", subsampling="4:2:0")
    return file.getvalue()


def find_rows(content: bytes) -> int:
    return next(begin + 1 for marker, begin, _ in iter_segments(content) if marker in START_OF_FRAME)


def decode_rows(content: bytes | memoryview, num_rows: int) -> np.ndarray:
    pixels = np.zeros((num_rows, WIDTH, 3), np.uint8)
    with announce_rows(content, find_rows(bytes(content)), num_rows) as shown, pytest.raises(ValueError) as caught:  # noqa: PT011
        simplejpeg.decode_jpeg(shown, fastupsample=True, min_height=num_rows, min_width=WIDTH, buffer=pixels)
    assert is_early_stop(caught.value), caught.value
    return pixels


def test_the_announced_rows_are_decoded_and_the_rest_is_reported(content):
    whole = simplejpeg.decode_jpeg(content, fastupsample=True)
    assert np.array_equal(decode_rows(content, 48), whole[:48])


def test_other_errors_are_no_early_stop(content):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        simplejpeg.decode_jpeg(content[: len(content) // 2])
    assert not is_early_stop(caught.value)


def test_writable_content_is_restored(content):
    writable = memoryview(bytearray(content))
    decode_rows(writable, 32)
    assert writable == content
