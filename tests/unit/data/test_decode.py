import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from gcvit.config.schema import AugmentConfig, DataConfig
from gcvit.data import decode as module
from gcvit.data.decode import Box, DecodeError, EncodedImage, decode
from gcvit.data.image_files import MAX_PIXELS
from gcvit.data.transforms import EvalTransform, TrainTransform, preserved_generators, seed_sample

WHOLE = 1 << 20  # a smallest side at which nothing is decoded smaller
SUBSAMPLINGS = ["4:4:4", "4:2:2", "4:2:0"]


def photo(height: int = 60, width: int = 80, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    """A JPEG has chroma at full size, of which all decoders make the same."""
    file = io.BytesIO()
    options = {"subsampling": "4:4:4"} | options if kind == "JPEG" else options
    image.save(file, kind, **options)
    return file.getvalue()


def oriented(image: Image.Image, orientation: int, kind: str = "JPEG", **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, kind, exif=exif, **options)


def read_whole(content: bytes, **options) -> np.ndarray:
    image = EncodedImage(content, **options)
    pixels, box = image.read(Box(0, 0, image.height, image.width), WHOLE)
    assert box == (0, 0, *pixels.shape[:2])
    return pixels


FILES = {
    "JPEG": encode(photo(), "JPEG"),
    "progressive": encode(photo(), "JPEG", progressive=True),
    "restarts": encode(photo(), "JPEG", restart_marker_rows=1),
    "grey JPEG": encode(photo().convert("L"), "JPEG"),
    "CMYK JPEG": encode(photo().convert("CMYK"), "JPEG"),
    "RGB JPEG": encode(photo(), "JPEG", keep_rgb=True),
    "PNG": encode(photo(), "PNG"),
    "alpha": encode(photo().convert("RGBA"), "PNG"),
    "grey alpha": encode(photo().convert("LA"), "PNG"),
    "palette": encode(photo().convert("P"), "PNG"),
    "transparent palette": encode(photo().convert("P"), "PNG", transparency=bytes(range(256))),
    "bits": encode(photo().convert("1"), "PNG"),
    "WebP": encode(photo(), "WEBP"),
    "animation": encode(photo(), "GIF", save_all=True, append_images=[photo(seed=1)]),
    "BMP": encode(photo(), "BMP"),
    "TIFF": encode(photo(), "TIFF"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_image_is_read_as_timm_does(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.asarray(Image.open(io.BytesIO(FILES[name])).convert("RGB"))
    assert np.array_equal(decode(FILES[name]), expected)
    assert np.array_equal(read_whole(memoryview(FILES[name])), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert EvalTransform(DataConfig(), 32)(FILES[name]).shape == (3, 32, 32)
        assert TrainTransform(AugmentConfig(), DataConfig(), 32)(FILES[name]).shape == (3, 32, 32)


def test_sixteen_bits_are_scaled():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for kind in ("PNG", "TIFF"):
        content = encode(Image.fromarray(ramp), kind)
        for pixels in (np.asarray(decode(content)), read_whole(content)):
            assert np.array_equal(pixels, np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("chroma", SUBSAMPLINGS)
@pytest.mark.parametrize("min_side", [WHOLE, 60, 25, 10])
def test_a_part_is_the_same_part_of_the_whole(chroma, min_side):
    """Stopping below a crop changes none of its pixels, at full size or smaller."""
    content = encode(photo(247, 331), "JPEG", subsampling=chroma, quality=90)
    image = EncodedImage(content)
    rng = np.random.default_rng(0)
    for _ in range(60):
        height, width = int(rng.integers(1, 200)), int(rng.integers(1, 300))
        box = Box(int(rng.integers(0, 247 - height)), int(rng.integers(0, 331 - width)), height, width)
        pixels, inner = image.read(box, min_side)
        scale = round(8 * inner.height / height) / 8
        assert scale in (1, 0.5, 0.25, 0.125)
        assert scale == 1 or min(inner.height, inner.width) >= min_side
        assert (inner.height, inner.width) == (height * scale, width * scale)
        size = {"min_height": -int(-247 * scale // 1), "min_width": -int(-331 * scale // 1)}
        whole = simplejpeg.decode_jpeg(content, fastupsample=True, **size)
        top, left = round(box.top * scale - inner.top), round(box.left * scale - inner.left)
        assert np.array_equal(pixels, whole[top : top + pixels.shape[0], left : left + pixels.shape[1]])


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind, orientation):
    options = {"progressive": True} if kind == "progressive" else {}
    content = oriented(photo(64, 96), orientation, "JPEG" if kind == "progressive" else kind, **options)
    with Image.open(io.BytesIO(content)) as image:
        stored, expected = np.asarray(image.convert("RGB")), np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(decode(content), stored)
    assert np.array_equal(decode(content, upright=True), expected)
    image = EncodedImage(content, upright=True)
    assert (image.height, image.width) == expected.shape[:2]
    for box in (Box(0, 0, image.height, image.width), Box(7, 11, 20, 33), Box(30, 2, 16, 40)):
        pixels, inner = image.read(box, WHOLE)
        top, left, height, width = (int(side) for side in box)
        assert inner == (0, 0, height, width)
        assert np.array_equal(pixels, expected[top : top + height, left : left + width])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_what_is_decoded_smaller(orientation):
    """Of a side that 8 does not divide, the last pixel shows less; a turn may put it first."""
    rows, columns = np.mgrid[:241, :329]
    ramps = Image.fromarray(np.stack([rows, columns * 3 // 4, columns * 3 // 4], axis=2).astype(np.uint8))
    content = oriented(ramps, orientation, quality=95)
    with Image.open(io.BytesIO(content)) as stored:
        upright = ImageOps.exif_transpose(stored).convert("RGB")
    image = EncodedImage(content, upright=True)
    for box in (Box(16, 16, 128, 192), Box(33, 21, 165, 142), Box(0, 0, image.height, image.width)):
        pixels, inner = image.read(box, 15)
        assert max(pixels.shape[:2]) <= 42
        views = []
        for source, (top, left, height, width) in ((upright, box), (Image.fromarray(pixels.copy()), inner)):
            edges = (left, top, left + width, top + height)
            views.append(np.asarray(source.resize((4, 4), Image.Resampling.BILINEAR, edges), np.float32))
        inside = np.abs(views[0] - views[1])[1:3, 1:3]
        assert inside.mean(axis=(0, 1)).max() < 2  # a pixel of the smaller image is 6 or 8


def test_orientation_is_ignored_where_the_recipe_does():
    content = oriented(photo(64, 96), 6)
    for upright in (False, True):
        data = DataConfig(exif_orientation=upright)
        turned = ImageOps.exif_transpose(Image.open(io.BytesIO(content))) if upright else photo(64, 96)
        expected = EvalTransform(DataConfig(), 32)(encode(turned, "PNG")).float()
        assert (EvalTransform(data, 32)(content).float() - expected).abs().mean() < 8
        augment = AugmentConfig(rand_augment=None, scale=(1, 1), ratio=(2 / 3, 1.5), hflip=0)
        with preserved_generators():
            seed_sample(0, 0, 0)
            view = TrainTransform(augment, data, 32)(content)
            seed_sample(0, 0, 0)
            assert (view.float() - TrainTransform(augment, data, 32)(encode(turned, "PNG")).float()).abs().mean() < 8


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bombs() -> dict[str, bytes]:
    side = 12 << 10  # squared, more than what we allow, and less than what Pillow does
    jpeg = bytearray(encode(photo(), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", side, side)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    gif = bytearray(encode(photo().convert("P"), "GIF"))
    gif[6:10] = struct.pack("<HH", side, side)
    bmp = bytearray(encode(photo(), "BMP"))
    bmp[18:26] = struct.pack("<ii", side, side)
    return {"JPEG": bytes(jpeg), "PNG": png, "GIF": bytes(gif), "BMP": bytes(bmp)}


BOMBS = bombs()


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_before_it_is_decoded(kind, monkeypatch):
    monkeypatch.setattr(module.simplejpeg, "decode_jpeg", None)
    monkeypatch.setattr(Image.Image, "convert", None)
    content = BOMBS[kind]
    for refuse in (decode, EncodedImage, lambda content: EncodedImage(content, upright=True)):
        with pytest.raises(DecodeError, match=r"12288 x 12288 pixels, more than 2\^27"):
            refuse(content)
    assert MAX_PIXELS == 2**27


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_image_is_corrupt(name):
    content = FILES[name]
    for length in range(0, len(content) - 40, max(1, len(content) // 150)):
        if name == "animation" and length > len(content) // 3:
            break  # the first frame is whole
        for transform in (TrainTransform(AugmentConfig(), DataConfig(), 32), EvalTransform(DataConfig(), 32)):
            with pytest.raises(DecodeError) as error:
                transform(content[:length])
            assert 0 < len(str(error.value)) < 200


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8", b"\xff\xd8\xff", bytes(1000)])
def test_what_is_no_image_is_told(content):
    for refuse in (decode, EncodedImage):
        with pytest.raises(DecodeError, match="it is none of JPEG, PNG, WEBP, GIF, BMP, TIFF"):
            refuse(content)


def test_a_format_beyond_ours_is_refused():
    with pytest.raises(DecodeError, match="it is none of"):
        decode(encode(photo(), "PPM"))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_flipped_bytes_raise_nothing_else(name, data):
    content = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    for upright in (False, True):
        config = DataConfig(exif_orientation=upright)
        for transform in (TrainTransform(AugmentConfig(), config, 16), EvalTransform(config, 16)):
            with contextlib.suppress(DecodeError):
                assert transform(bytes(content)).shape == (3, 16, 16)


def test_what_pillow_reads_is_no_corruption():
    """libjpeg-turbo warns of rubbish before the end marker; Pillow, and so the published recipe, reads on."""
    content = FILES["JPEG"]
    odd = content[:-2] + b"rubbish" + content[-2:]
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(odd)
    assert np.array_equal(read_whole(odd), np.asarray(decode(odd)))


def test_want_of_memory_is_no_corruption(monkeypatch):
    """It would be replaced and charged to the budget, though the image is sound."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        decode(buffer.getvalue())
    monkeypatch.setattr(simplejpeg, "decode_jpeg", fail)
    with pytest.raises(MemoryError):
        EncodedImage(buffer.getvalue()).read(Box(0, 0, 8, 8), 8)
