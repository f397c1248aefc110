"""Decode the pixels of a part of an image, and no more.

1. The header tells the size, so that a crop can be drawn before anything is decoded.
2. Of a JPEG that comes in one scan, the rows below the crop are not decoded: for the decoder, the header announces
   fewer rows, and it stops there.
3. A JPEG's crop that is to shrink by two or more is decoded at 1/2, 1/4 or 1/8 of its size, which the inverse cosine
   transform does by itself: it computes fewer values, and fewer are left to resize.
4. All else is Pillow's: other formats, CMYK, and any JPEG of which libjpeg-turbo says that something is wrong. So an
   image is corrupt where Pillow cannot read it, whichever part of it a crop asks for.
"""

import io
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, ImageOps

from gcvit.data.image_files import FORMATS, MAX_PIXELS
from gcvit.data.jpeg_early_stop import MARGIN_ROWS, announce_rows, is_early_stop
from gcvit.data.jpeg_header import EXIF, PROGRESSIVE, RESTART_INTERVAL, START_OF_FRAME, Frame, iter_segments, read_frame

Bytes = bytes | memoryview
Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")


class DecodeError(ValueError):
    """Bytes are not a supported image: another format, corrupt, or too many pixels."""


class Box(NamedTuple):
    """A rectangle in an image, in pixels and fractions thereof."""

    top: float
    left: float
    height: float
    width: float


def decode(content: Bytes, *, upright: bool = False) -> Image.Image:
    """Decode the whole image to RGB by Pillow alone: grey repeated, alpha dropped, CMYK converted, as timm does.

    16-bit grey is scaled to 8 bits; of an animation it is the first frame. `upright` turns the image as its EXIF
    orientation says.

    Raises:
        DecodeError: the bytes are not a supported image.
    """
    image = _open(content, upright)
    return _guard(lambda: _to_rgb(image))


class EncodedImage:
    """An image of which only the header was read.

    `height` and `width` are in pixels, after the turn if `upright`.

    Raises:
        DecodeError: the bytes are not a supported image, or exceed `MAX_PIXELS`, of which none is decoded.
    """

    def __init__(self, content: Bytes, *, upright: bool = False):
        self._content, self._upright = content, upright
        self._jpeg = _read_jpeg_header(content, upright)
        if self._jpeg is None:
            self._image = _open(content, upright)
            self.height, self.width = self._image.height, self._image.width
        else:
            self.height, self.width = self._jpeg.height, self._jpeg.width
            _check_size(self.height, self.width)
            self._turn = _TURNS[self._jpeg.orientation]
            if self._turn.swap:
                self.height, self.width = self.width, self.height

    def read(self, box: Box, min_side: int) -> tuple[Pixels, Box]:
        """Decode a box of whole pixels.

        A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, if neither side of the box is less than `min_side` then.

        Returns:
            RGB pixels, uint8 [h, w, 3], and the box in them, since they may hold more.

        Raises:
            DecodeError: the image is corrupt.
        """
        if self._jpeg is not None:
            try:
                pixels, inner = _decode_jpeg(self._content, self._jpeg, self._turn.undo(box, self), min_side)
                return self._turn(pixels, inner)
            except ValueError:
                self._image = _open(self._content, self._upright)
        if self._image.size != (self.width, self.height):
            raise DecodeError("its headers disagree on its size")
        edges = int(box.left), int(box.top), int(box.left + box.width), int(box.top + box.height)
        pixels = _guard(lambda: np.array(_to_rgb(self._image.crop(edges))))
        return pixels, Box(0, 0, box.height, box.width)


def _open(content: Bytes, upright: bool) -> Image.Image:
    """Open an image by Pillow, which reads the header, or the whole image if it is to be turned upright."""
    image = _guard(lambda: Image.open(io.BytesIO(content), formats=FORMATS))
    _check_size(image.height, image.width)
    return _guard(lambda: ImageOps.exif_transpose(image)) if upright else image


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DecodeError(f"it announces {width} x {height} pixels, more than 2^27")


def _guard(work: Callable[[], T]) -> T:
    """Call `work` without Pillow's warnings.

    Raises:
        DecodeError: in place of almost anything that Pillow raises.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, whose size is checked, and of faults in metadata
            return work()
    except MemoryError:  # the machine's fault, not the image's: its size was checked
        raise
    except Exception as error:  # corrupt bytes make Pillow raise almost anything, and only Pillow runs in here
        if isinstance(error, Image.UnidentifiedImageError):
            raise DecodeError(f"it is none of {', '.join(FORMATS)}") from None
        reason = str(error) if isinstance(error, OSError | DecodeError) else f"{type(error).__name__}: {error}"
        raise DecodeError(reason) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # which Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


class _JpegHeader(NamedTuple):
    height: int
    width: int
    rows_at: int | None  # byte offset of the 16-bit number of rows, where decoding may stop before the last
    orientation: int  # EXIF's, 1 to 8; 1 is upright, or was not asked for


def _read_jpeg_header(content: Bytes, upright: bool) -> _JpegHeader | None:
    """Return None for all but 8-bit grey and YCbCr or RGB JPEGs."""
    frame: Frame | None = None
    rows_at, can_stop, orientation = 0, True, 1
    try:
        for marker, begin, end in iter_segments(content):
            if marker in START_OF_FRAME:
                frame, rows_at = read_frame(content, begin), begin + 1
                can_stop &= marker != PROGRESSIVE  # each of its scans covers all rows
            elif marker == RESTART_INTERVAL:
                can_stop = False  # restart markers make the rest look different to the decoder
            elif upright and marker == EXIF and content[begin : begin + 6] == b"Exif\0\0":
                orientation = _read_orientation(bytes(content[begin:end]))
    except IndexError:  # truncated
        return None
    if frame is None or frame.precision != 8 or frame.num_components not in (1, 3) or not frame.height * frame.width:
        return None
    return _JpegHeader(frame.height, frame.width, rows_at if can_stop else None, orientation)


def _read_orientation(exif: bytes) -> int:
    try:
        parsed = Image.Exif()
        parsed.load(exif)
        orientation = parsed.get(ExifTags.Base.Orientation, 1)
    except Exception:  # as `_guard`: whatever is wrong with the metadata, the photograph may be whole
        return 1
    return orientation if orientation in _TURNS else 1


def _decode_jpeg(content: Bytes, header: _JpegHeader, box: Box, min_side: int) -> tuple[Pixels, Box]:
    """Decode a box as `EncodedImage.read` does, before any turn.

    Raises:
        ValueError: the decoder reports an error, or only a warning.
    """
    eighths = 8
    while eighths > 1 and min(box.height, box.width) * eighths >= 16 * min_side:
        eighths //= 2
    num_rows = header.height
    if header.rows_at is not None:
        num_rows = min(num_rows, int(box.top + box.height) + MARGIN_ROWS * 8 // eighths)
    height, width = (-(-side * eighths // 8) for side in (num_rows, header.width))
    pixels = np.empty((height, width, 3), np.uint8)
    try:
        with _show_rows(content, header, num_rows) as shown:
            # Chroma is brought to full size by repeating it: 5 % less work, at most 1 % of the range in a crop's mean.
            simplejpeg.decode_jpeg(shown, fastupsample=True, min_height=height, min_width=width, buffer=pixels)
    except MemoryError:
        raise
    except Exception as error:  # only simplejpeg runs in here
        if num_rows == header.height or not is_early_stop(error):
            raise ValueError(str(error)) from None
    box = Box(*(side * eighths / 8 for side in box))
    top, left = math.floor(box.top), math.floor(box.left)
    bottom, right = math.ceil(box.top + box.height), math.ceil(box.left + box.width)
    return pixels[top:bottom, left:right], box._replace(top=box.top - top, left=box.left - left)


def _show_rows(content: Bytes, header: _JpegHeader, num_rows: int) -> AbstractContextManager[Bytes]:
    if header.rows_at is None or num_rows == header.height:
        return nullcontext(content)
    return announce_rows(content, header.rows_at, num_rows)


class _Turn(NamedTuple):
    """A turn by quarters, mirrored or not: rows and columns swapped, then their order reversed."""

    swap: bool = False
    reverse_rows: bool = False
    reverse_columns: bool = False

    def __call__(self, pixels: Pixels, box: Box) -> tuple[Pixels, Box]:
        """Turn pixels [h, w, 3] and a box in them."""
        if self.swap:
            pixels, box = pixels.swapaxes(0, 1), Box(box.left, box.top, box.width, box.height)
        box = self._reverse(box, pixels.shape[0], pixels.shape[1])
        return pixels[:: -1 if self.reverse_rows else 1, :: -1 if self.reverse_columns else 1], box

    def undo(self, box: Box, image: EncodedImage) -> Box:
        """Map a box of the upright image to the image as it is stored."""
        top, left, height, width = self._reverse(box, image.height, image.width)
        return Box(left, top, width, height) if self.swap else Box(top, left, height, width)

    def _reverse(self, box: Box, height: int, width: int) -> Box:
        top = height - box.top - box.height if self.reverse_rows else box.top
        left = width - box.left - box.width if self.reverse_columns else box.left
        return Box(top, left, box.height, box.width)


_TURNS = {  # by EXIF's orientation
    1: _Turn(),
    2: _Turn(reverse_columns=True),
    3: _Turn(reverse_rows=True, reverse_columns=True),
    4: _Turn(reverse_rows=True),
    5: _Turn(swap=True),
    6: _Turn(swap=True, reverse_columns=True),
    7: _Turn(swap=True, reverse_rows=True, reverse_columns=True),
    8: _Turn(swap=True, reverse_rows=True),
}
