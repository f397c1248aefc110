"""What an image is: formats told by content, pixel bombs refused, large images re-encoded smaller."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

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
OPENERS = [name for name in EXTENSIONS if name != "MPO"]  # Pillow opens MPO as JPEG, then renames it
MAX_PIXELS = 2**27  # 402 MB in RGB: beyond any photograph to train on, and short of a machine's memory
BOMB = f"announces more than {MAX_PIXELS:,} pixels"

_ORIENTATION = 0x0112  # the EXIF tag
_START_OF_FRAME = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: what decoders know
_APPLICATION, _ADOBE = range(0xE0, 0xF0), 0xEE
_QUANTIZATION, _HUFFMAN, _RESTART, _COMMENT, _START_OF_SCAN = 0xDB, 0xC4, 0xDD, 0xFE, 0xDA


@dataclass(frozen=True)
class Reduction:
    """Images whose short side exceeds `short_side` pixels become JPEGs of that short side.

    Their bytes depend on the versions of Pillow and libjpeg: let all parts of a run have the same.
    """

    short_side: int
    quality: int  # of libjpeg, 1 to 100


def image_extension(data: bytes) -> str:
    """The extension that fits an image's content by magic bytes and header, whatever its file was called.

    Pixels are not decoded. Errors: ValueError with the reason where the bytes are no image of a known format, or
    their header announces more than `MAX_PIXELS`.
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
    """The image as an RGB JPEG whose short side has `reduction.short_side` pixels; `data` where it has no more.

    Grey is repeated and alpha dropped, as in training. The pixels keep the order they lie in and the EXIF
    orientation stays beside them, so that training turns re-encoded and untouched images alike, once or not at
    all (`data.exif_orientation`). All else that the file says about itself goes.
    Errors: ValueError as of `image_extension`, and for pixels that do not decode.
    """
    size = _jpeg_size(data)
    if size is not None and min(size) <= reduction.short_side:
        return data
    with _opened(data) as image:
        if min(image.size) <= reduction.short_side:
            return data
        scale = reduction.short_side / min(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        orientation = image.getexif().get(_ORIENTATION)
        # libjpeg decodes to a half, a quarter or an eighth for next to nothing; twice the size keeps Lanczos exact.
        image.draft(None, (2 * width, 2 * height))
        small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    small.info.clear()
    exif = Image.Exif()
    if orientation is not None:
        exif[_ORIENTATION] = orientation
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=reduction.quality, exif=exif.tobytes() if exif else b"")
    return buffer.getvalue()


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG, read from its markers; None where it is no JPEG, or one in any way unusual.

    A quarter of what Pillow takes for it, and what is unusual is left for Pillow to judge.
    """
    if data[:2] != b"\xff\xd8":
        return None
    size = None
    place = 2
    while len(data) >= place + 4:
        mark, marker, length = data[place], data[place + 1], data[place + 2] << 8 | data[place + 3]
        segment, place = place + 4, place + 2 + length
        if mark != 0xFF or length < 2 or place > len(data):
            return None
        if marker == _START_OF_SCAN:
            return size
        if marker in _START_OF_FRAME:
            precision, high, low, wide, narrow, num_components = data[segment : segment + 6].ljust(6, b"\0")
            size = (wide << 8 | narrow, high << 8 | low)
            is_usual = precision == 8 and num_components in (1, 3, 4) and length == 8 + 3 * num_components
            if not is_usual or not all(size):
                return None
        elif marker == _QUANTIZATION:
            if (length - 2) % 65 or max(data[segment:place:65], default=4) > 3:
                return None
        elif marker in _APPLICATION:
            # Too short for what Pillow reads in it; or the directory of a file of many pictures.
            if length < (14 if marker == _ADOBE else 16) or data[segment : segment + 4] == b"MPF\0":
                return None
        elif marker not in (_HUFFMAN, _RESTART, _COMMENT):
            return None
    return None


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """`data` as Pillow opens it. Errors: ValueError with a reason, for whatever it meets inside too.

    Pillow's plugins raise whatever their parsing meets in corrupt bytes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that are allowed here, and of odd metadata
            with Image.open(io.BytesIO(data), formats=OPENERS) as image:
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
