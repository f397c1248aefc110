"""Detect image formats by content, refuse decompression bombs, re-encode large images smaller."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import ExifTags, Image, UnidentifiedImageError

from gcvit.data.image_files import FORMATS, MAX_PIXELS
from gcvit.data.jpeg_header import (
    ADOBE,
    APPLICATION,
    COMMENT,
    HUFFMAN_TABLE,
    QUANTIZATION_TABLE,
    RESTART_INTERVAL,
    START_OF_FRAME,
    START_OF_SCAN,
    iter_segments,
    read_frame,
)

# Pillow's name of a format -> the extension in a shard. MPO is a JPEG with a second picture.
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
}
BOMB = f"announces more than {MAX_PIXELS:,} pixels"


@dataclass(frozen=True)
class Reduction:
    """Limit of the short side in pixels: larger images become JPEGs with a short side of that many.

    Their bytes depend on the versions of Pillow and libjpeg: all parts of a sharding must use the same.
    """

    short_side: int
    quality: int  # of libjpeg, 1 to 100


def image_extension(data: bytes) -> str:
    """Return the extension that fits an image's content by magic bytes and header, whatever its file was called.

    Pixels are not decoded.

    Raises:
        ValueError: The bytes are no image of a known format, or their header announces more than `MAX_PIXELS`.
    """
    size = _jpeg_size(data)
    if size is not None:
        if size[0] * size[1] > MAX_PIXELS:
            raise ValueError(BOMB)
        return "jpg"
    with _opened(data) as image:
        extension = EXTENSIONS[str(image.format)]
        image.verify()
    return extension


def reduce_image(data: bytes, reduction: Reduction) -> bytes:
    """Re-encode an image as an RGB JPEG whose short side has `reduction.short_side` pixels; keep one that has no more.

    Grey is repeated and alpha dropped, as in training. The pixels keep their order and the file its EXIF orientation,
    so that training rotates re-encoded and untouched images alike (`data.exif_orientation`). All other metadata is
    dropped.

    Raises:
        ValueError: As of `image_extension`, or the pixels do not decode.
    """
    size = _jpeg_size(data)
    if size is not None and min(size) <= reduction.short_side:
        return data
    with _opened(data) as image:
        if min(image.size) <= reduction.short_side:
            return data
        scale = reduction.short_side / min(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        # libjpeg decodes to a half, a quarter or an eighth for next to nothing; twice the size keeps Lanczos exact.
        image.draft(None, (2 * width, 2 * height))
        small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    small.info.clear()
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=reduction.quality, exif=exif.tobytes() if exif else b"")
    return buffer.getvalue()


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height of a JPEG, or None if it is no JPEG or an unusual one, which Pillow must judge.

    This needs a quarter of Pillow's time.
    """
    size = None
    try:
        for marker, begin, end in iter_segments(data):
            if not begin <= end <= len(data):
                return None
            if marker == START_OF_SCAN:
                return size
            if marker in START_OF_FRAME:
                frame = read_frame(data, begin)
                size = (frame.width, frame.height)
                num_bytes = 6 + 3 * frame.num_components
                if frame.precision != 8 or frame.num_components not in (1, 3, 4) or end - begin != num_bytes:
                    return None
                if not all(size):
                    return None
            elif marker == QUANTIZATION_TABLE:
                if (end - begin) % 65 or max(data[begin:end:65], default=4) > 3:
                    return None
            elif marker in APPLICATION:
                # Too short for what Pillow reads in it; or the index of a file of several pictures.
                if end - begin < (12 if marker == ADOBE else 14) or data[begin : begin + 4] == b"MPF\0":
                    return None
            elif marker not in (HUFFMAN_TABLE, RESTART_INTERVAL, COMMENT):
                return None
    except IndexError:  # truncated
        return None
    return None  # corrupt before the start of scan


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open an image with Pillow; turn the errors of the `with` block, too, into a ValueError with the reason.

    Pillow's plugins raise errors of many types for corrupt bytes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that are allowed here, and of odd metadata
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                yield image
    except UnidentifiedImageError:
        raise ValueError("no known image format" if data else "an empty file") from None
    except Image.DecompressionBombError:
        raise ValueError(BOMB) from None
    except MemoryError:  # the machine's fault, not the image's: its size was checked
        raise
    except Exception as error:
        raise ValueError(f"corrupt: {error}") from None
