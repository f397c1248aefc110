"""Formats follow from the content, bombs and corruption are refused, and only large images are re-encoded."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_prep import images
from data_prep.images import EXTENSIONS, Reduction, image_extension, reduce_image
from gcvit.data.image_files import MAX_PIXELS

ORIENTATION = 0x0112


def gradient(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth, so that it survives JPEG: red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 99)], 2).astype(np.uint8)).convert(mode)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


JPEGS = {
    "plain": encode(gradient(40, 30)),
    "progressive": encode(gradient(40, 30), progressive=True, optimize=True),
    "grey": encode(gradient(40, 30, "L"), comment=b"grey"),
    "cmyk": encode(gradient(40, 30, "CMYK")),
    "turned": encode(gradient(40, 30), exif=b"Exif\0\0" + Image.Exif().tobytes(), icc_profile=b"p" * 200, dpi=(72, 72)),
}


@pytest.mark.parametrize("kind", sorted(set(EXTENSIONS) - {"MPO"}))
def test_the_extension_follows_the_content(make_image, kind):
    assert image_extension(make_image(0, kind)) == EXTENSIONS[kind]


@pytest.mark.parametrize("name", JPEGS)
def test_usual_jpegs_need_no_pillow(name, monkeypatch):
    monkeypatch.setattr(images.Image, "open", None)
    assert image_extension(JPEGS[name]) == "jpg"
    assert images._jpeg_size(JPEGS[name]) == (40, 30)


def test_a_jpeg_with_a_second_picture_is_a_jpeg():
    first, second = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "red")
    data = encode(first, "MPO", save_all=True, append_images=[second])
    assert decode(data).format == "MPO"
    assert image_extension(data) == "jpg"


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff", b"\x1f\x8b\x08" + bytes(99), b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(ValueError, match=r"empty file|no known image|corrupt"):
        image_extension(data)
    with pytest.raises(ValueError, match=r"empty file|no known image|corrupt"):
        reduce_image(data, Reduction(8, 90))


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_cut_within_its_headers_is_refused(name):
    data = JPEGS[name]
    for length in range(data.index(b"\xff\xda")):
        with pytest.raises(ValueError, match=r"empty|no known|corrupt"):
            image_extension(data[:length])


@given(st.sampled_from(sorted(JPEGS)), st.data())
def test_what_passes_without_pillow_has_the_size_that_pillow_reads(name, draw):
    """Corruption up to the pixels: either Pillow judges it, or it reads the same."""
    data = bytearray(JPEGS[name])
    for _ in range(draw.draw(st.integers(1, 3))):
        data[draw.draw(st.integers(0, data.index(b"\xff\xda") + 3))] = draw.draw(st.integers(0, 255))
        if b"\xff\xda" not in data:
            break
    size = images._jpeg_size(bytes(data))
    if size is not None:
        assert decode(bytes(data)).size == size


def png_header(width: int, height: int) -> bytes:
    content = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + content
        + struct.pack(">I", zlib.crc32(content))
        + bytes(4)
        + b"IDAT"
    )


def jpeg_header(width: int, height: int) -> bytes:
    data = bytearray(JPEGS["plain"])
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [jpeg_header(65535, 2049), png_header(2**14, 2**13 + 1), png_header(2**20, 2**20)],
    ids=["jpg", "png", "huge"],
)
def test_a_pixel_bomb_is_refused(data, recwarn):
    with pytest.raises(ValueError, match=r"^announces .* pixels"):
        image_extension(data)
    with pytest.raises(ValueError, match=r"^announces .* pixels"):
        reduce_image(data, Reduction(8, 90))
    assert not recwarn.list


def test_as_many_pixels_as_allowed_are_no_bomb(recwarn):
    assert image_extension(jpeg_header(2**14, 2**13)) == "jpg"
    assert MAX_PIXELS == 2**14 * 2**13
    assert not recwarn.list


@pytest.mark.parametrize("size", [(30, 30), (30, 99), (99, 30), (7, 5)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_small_images_stay_byte_for_byte(size, kind):
    data = encode(gradient(*size), kind)
    assert reduce_image(data, Reduction(30, 90)) is data


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB")]
)
def test_large_images_become_small_rgb_jpegs_of_the_same_look(kind, mode):
    original = gradient(320, 240, mode)
    data = encode(original, kind)
    small = decode(reduce_image(data, Reduction(60, 95)))
    assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (80, 60))
    expected = decode(data).convert("RGB").resize((80, 60), Image.Resampling.BOX)
    assert np.abs(np.asarray(small, float) - np.asarray(expected, float)).mean() < 3


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64))
def test_the_short_side_is_exact_and_the_shape_is_kept(width, height, short_side):
    data = encode(Image.new("RGB", (width, height)), "PNG")
    reduced = decode(reduce_image(data, Reduction(short_side, 50)))
    if min(width, height) <= short_side:
        assert reduced.size == (width, height)
    else:
        assert min(reduced.size) == short_side
        assert abs(max(reduced.size) - max(width, height) * short_side / min(width, height)) <= 0.5


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_a_photograph_is_turned_as_often_as_before(orientation):
    """Re-encoded, it looks the same to readers that follow the EXIF tag and to those that do not."""
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    if orientation is not None:
        exif[ORIENTATION] = orientation
    data = encode(gradient(120, 80), exif=exif.tobytes(), comment=b"private", icc_profile=b"p" * 200)
    reduced = reduce_image(data, Reduction(40, 95))
    for orient in (lambda image: image, ImageOps.exif_transpose):
        before, after = orient(decode(data)), orient(decode(reduced))
        assert (before.width / 2, before.height / 2) == after.size
        difference = np.asarray(before.resize(after.size), float) - np.asarray(after, float)
        assert np.abs(difference).mean() < 3
    assert set(decode(reduced).getexif()) == ({ORIENTATION} if orientation is not None else set())
    assert b"private" not in reduced
    assert b"ppp" not in reduced


def test_quality_counts():
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8))
    sizes = [len(reduce_image(encode(noise, "PNG"), Reduction(32, quality))) for quality in (30, 60, 90)]
    assert sizes == sorted(set(sizes))


def test_a_truncated_image_cannot_be_re_encoded():
    data = encode(gradient(320, 240))
    with pytest.raises(ValueError, match=r"corrupt: .*truncated"):
        reduce_image(data[: len(data) // 2], Reduction(60, 90))
