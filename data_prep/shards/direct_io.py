"""Write a large file past the page cache (O_DIRECT), in a thread beside the caller.

Sharding reads as much as it writes. Writes through the page cache copy every byte, search for free pages, evict the
images from memory, and leave the disk idle until fsync. Measured on ext4 (benchmarks/RESULTS.md): plain writes need 1.2
times the time, which would bring sharding down to its bar.
"""

import errno
import fcntl
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

BUFFER_BYTES = 2 << 20  # a multiple of any disk's block
_DIRECT: int = getattr(os, "O_DIRECT", 0)  # Linux has it


class DirectFile:
    """A new file, to which one thread appends. Use it as a context manager; only `finish` completes the file.

    Any method raises OSError for an error of an earlier write, such as a full disk.
    """

    def __init__(self, path: Path):
        self._descriptor = _create(path)
        self._buffer, self._other = _buffers()
        self._filled = 0
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._wait()
        finally:
            os.close(self._descriptor)

    def append(self, data: bytes) -> None:
        """Copy `data` into the buffer; a full one is written while the caller goes on."""
        view = memoryview(data)
        while view:
            part = view[: BUFFER_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == BUFFER_BYTES:
                self._wait()
                self._writing = _thread().submit(_write, self._descriptor, self._buffer)
                self._buffer, self._other = self._other, self._buffer
                self._filled = 0

    def finish(self) -> None:
        """Write the rest of the buffer, and flush all to disk."""
        self._wait()
        _disable_direct(self._descriptor)  # the rest is no multiple of a block
        _write(self._descriptor, self._buffer[: self._filled])
        os.fsync(self._descriptor)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1)


@cache
def _buffers() -> tuple[memoryview, memoryview]:
    """Allocate two buffers, aligned to pages as direct writes require. Files reuse them, since new memory is slow."""
    memory = mmap.mmap(-1, 2 * BUFFER_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # a disk's driver pins a few large pages faster than a thousand small ones
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:BUFFER_BYTES], memoryview(memory)[BUFFER_BYTES:]


def _create(path: Path) -> int:
    flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)  # a file system without direct writes


def _disable_direct(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_DIRECT)


def _write(descriptor: int, data: memoryview) -> None:
    try:
        data = data[os.write(descriptor, data) :]
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    if data:  # the file system needs other blocks, or its disk is nearly full: a plain write works or has the error
        _disable_direct(descriptor)
    while data:
        data = data[os.write(descriptor, data) :]
