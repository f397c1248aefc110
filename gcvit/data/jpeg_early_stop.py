"""Stop decoding a JPEG above its last row, which neither simplejpeg nor libjpeg-turbo offers.

The header announces fewer rows than there are. libjpeg-turbo decodes these, and then reports the rest as a warning,
which simplejpeg raises. Written for simplejpeg 1.9.0 with libjpeg-turbo 3; `tests/unit/data/test_jpeg_early_stop.py`
fails if another release decodes or reports it differently.
"""

from collections.abc import Iterator
from contextlib import contextmanager

# No row of a crop depends on rows further below it, at the size it is decoded at: chroma may be four times coarser.
MARGIN_ROWS = 4
_REPORT = "extraneous bytes before marker 0xd9"


@contextmanager
def announce_rows(content: bytes | memoryview, rows_at: int, num_rows: int) -> Iterator[memoryview]:
    """Yield the JPEG with another number of rows in its header; writable content is changed in place meanwhile.

    Args:
        rows_at: byte offset of the 16-bit number of rows.
    """
    place = slice(rows_at, rows_at + 2)
    shown = content if isinstance(content, memoryview) and not content.readonly else memoryview(bytearray(content))
    original = bytes(shown[place])
    shown[place] = num_rows.to_bytes(2, "big")
    try:
        yield shown
    finally:
        shown[place] = original


def is_early_stop(error: Exception) -> bool:
    """Tell whether an error of `simplejpeg.decode_jpeg` only reports the rows that were not announced."""
    return str(error).endswith(_REPORT)
