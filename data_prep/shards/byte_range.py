"""Read a byte range of a file."""

import os
import stat
from pathlib import Path
from typing import NamedTuple


class Place(NamedTuple):
    """Byte range of an image: `file` is relative to a source's root; `length` None is the whole file."""

    file: str
    offset: int = 0
    length: int | None = None


def read_place(root: Path, place: Place) -> bytes:
    """Read the bytes at a place.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file ends before, or is no regular file.
    """
    # Plain system calls: file objects and paths would cost as much as reading a hundred kilobytes does.
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    descriptor = os.open(os.path.join(root, place.file) if place.file else root, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("no regular file")
        length = status.st_size - place.offset if place.length is None else place.length
        data = os.pread(descriptor, length, place.offset)
    finally:
        os.close(descriptor)
    if len(data) < length:
        raise ValueError(f"ends {length - len(data)} bytes before the sample at {place.offset} does")
    return data
