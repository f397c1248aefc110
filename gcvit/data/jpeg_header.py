"""Parse JPEG headers; no pixel is decoded. Source: ITU-T T.81, annex B."""

from collections.abc import Iterator
from typing import NamedTuple

START_OF_FRAME = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: the processes that decoders implement
PROGRESSIVE = 0xC2
HUFFMAN_TABLE = 0xC4
START_OF_SCAN = 0xDA
QUANTIZATION_TABLE = 0xDB
RESTART_INTERVAL = 0xDD
APPLICATION = range(0xE0, 0xF0)
EXIF = 0xE1
ADOBE = 0xEE
COMMENT = 0xFE


class Frame(NamedTuple):
    """Size in pixels, bits of a value, and number of colour components of an image."""

    precision: int
    height: int
    width: int
    num_components: int


def iter_segments(content: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """Yield each header segment: its marker, and begin and end of its payload in `content`.

    The last one is the start of scan. Another last one means corrupt bytes between segments, none at all another
    format. `begin` and `end` are not checked: a corrupt length may put the end before the begin or beyond the content.

    Raises:
        IndexError: The content ends before the start of scan.
    """
    if content[:2] != b"\xff\xd8":
        return
    at = 2
    while content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        end = at + 2 + (content[at + 2] << 8 | content[at + 3])
        yield marker, at + 4, end
        if marker == START_OF_SCAN:
            return
        at = end


def read_frame(content: bytes | memoryview, begin: int) -> Frame:
    """Read the start of frame whose payload begins at byte `begin`; the height is the 16 bits at `begin` + 1.

    Raises:
        IndexError: The content ends before.
    """
    precision, high, low, wide, narrow, num_components = (content[begin + i] for i in range(6))
    return Frame(precision, high << 8 | low, wide << 8 | narrow, num_components)
