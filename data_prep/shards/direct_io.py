"""Writes a large file past the page cache, while the caller prepares what comes next.

Sharding reads as much as it writes. Through the page cache, the copy into it and the hunt for free pages take a
fifth of the processor's time, push the images out of memory, and leave the disk idle until it must be waited for.
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
    """A new file at `path`, for one thread to append to. Use it as a context manager; only `finish` makes it whole.

    Errors: OSError, where the disk is full among others; from the write that meets it or a later one.
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
        """Write what is left, and flush all to disk."""
        self._wait()
        _leave_direct(self._descriptor)  # the rest is no multiple of a block
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
    """Two buffers, aligned to pages as direct writes need them. New memory is slow, so files share them in turn."""
    memory = mmap.mmap(-1, 2 * BUFFER_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # a disk's driver holds a few large pages sooner than a thousand small ones
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


def _leave_direct(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_DIRECT)


def _write(descriptor: int, data: memoryview) -> None:
    try:
        data = data[os.write(descriptor, data) :]
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    if data:  # the file system wants other blocks, or its disk is nearly full: in plain mode it goes on, or says so
        _leave_direct(descriptor)
    while data:
        data = data[os.write(descriptor, data) :]
