"""Find the members of a tar from its headers alone: one pass, which skips the payloads.

Knows ustar with its prefixes, GNU long names and sizes, and pax headers. Each header's checksum is checked, so that a
corrupt header is never followed. A member's name is a text here, never a path.
"""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

BLOCK = 512
MAX_TEXT_BYTES = 1 << 20  # of a label or an extended header: what is longer is neither
_EMPTY = bytes(BLOCK)
# What follows an image up to the next image's header fits in this: a pread per sample, not one per member.
_WINDOW_BYTES = 3072
_REGULAR = ord("0")
_SCAN_BYTES = 1 << 20
_ADLER_MODULUS = 65521
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_FOLDER = ord("5")
_REMARKS = b"gKV"  # about the whole tar, a link's target, the tar's label
_OTHER_KINDS = {
    ord("1"): "a hard link",
    ord("2"): "a symbolic link",
    ord("3"): "a device",
    ord("4"): "a device",
    ord("6"): "a pipe",
}
_FETCH_AGAIN = "copy or fetch it again"


class BrokenTar(Exception):
    """A tar cannot be read beyond byte `position`."""

    def __init__(self, position: int, reason: str, hint: str = _FETCH_AGAIN):
        super().__init__(reason)
        self.position = position
        self.hint = hint


# A regular file in a tar: its name, the byte at which its payload begins, the payload's size.
Member = tuple[str, int, int]


class Piece(NamedTuple):
    """A member with its headers: it occupies the bytes from `start` to `end`, which are whole blocks."""

    name: str
    start: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size + -self.size % BLOCK


class TarReader:
    """A tar that is open for random access. Use it as a context manager."""

    def __init__(self, path: Path, begin: int = 0, num_bytes: int | None = None, *, read_ahead: bool = True):
        """Open a tar, or with `begin` and `num_bytes` one that is a member of the file at `path`.

        Args:
            begin: Byte of the file at which the tar begins; all other positions count from there.
            num_bytes: Size of the tar; None for all from `begin` on.
            read_ahead: Let the kernel read ahead. False pays if only headers are read.
        """
        self._descriptor = os.open(path, os.O_RDONLY)
        self._begin = begin
        self.num_bytes = os.fstat(self._descriptor).st_size - begin if num_bytes is None else num_bytes
        if not read_ahead and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._window = b""
        self._window_start = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer if the tar ends before."""
        start = offset - self._window_start
        end = start + size
        if start >= 0 and end <= len(self._window):
            return self._window[start:end]
        if size > _WINDOW_BYTES:
            return self._pread(size, offset)
        self._window, self._window_start = self._pread(_WINDOW_BYTES, offset), offset
        return self._window[:size]

    def _pread(self, size: int, offset: int) -> bytes:
        return os.pread(self._descriptor, max(0, min(size, self.num_bytes - offset)), self._begin + offset)

    def members(self, position: int = 0, *, files_only: bool = False) -> Iterator[Member]:
        """Yield the regular files from the header at byte `position` on. Folders are skipped.

        Args:
            files_only: Refuse links, devices and members of unknown kinds, which are skipped otherwise.

        Raises:
            BrokenTar: The tar is corrupt, truncated or compressed, or holds a sparse file; or see `files_only`.
        """
        long_name: str | None = None
        long_size: int | None = None
        start = position  # of the member with its extended headers
        read, num_bytes = self.read, self.num_bytes
        while True:
            header = read(position, BLOCK)
            if header == _EMPTY:
                self._check_end(position)
                return
            size = _payload_size(header)
            if size is None:
                raise self._explain(header, position, start)
            position += BLOCK
            kind = header[156]
            # Nearly all headers are of this kind, stand alone and have no prefix: for these, no further questions.
            if kind == _REGULAR and position == start + BLOCK and not header[345]:
                name = header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
                if position + size > num_bytes:
                    raise BrokenTar(start, f"truncated in {name}: {num_bytes - position} of {size} bytes")
                yield name, position, size
                position = start = position + size + -size % BLOCK
                continue
            if kind in b"LxX":
                text = self._read_extended(position, size, start)
                if kind == ord("L"):
                    long_name = _text(text)
                else:
                    name_found, size_found = _read_pax(text, start)
                    long_name = long_name if name_found is None else name_found
                    long_size = long_size if size_found is None else size_found
                position += size + -size % BLOCK
                continue
            if long_name is not None:
                name = long_name
            else:
                name = header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
                if header[345] and header[257:263] == b"ustar\0":
                    name = f"{_text(header[345:500])}/{name}"
            if long_size is not None:
                size = long_size
            if kind in b"0\x007" and not (kind == 0 and name.endswith("/")):
                if position + size > num_bytes:
                    raise BrokenTar(start, f"truncated in {name}: {num_bytes - position} of {size} bytes")
                yield name, position, size
            elif kind == ord("S"):
                raise _not_a_file(start, name, "a sparse file")
            elif files_only and kind not in (0, _FOLDER) and kind not in _REMARKS:
                raise _not_a_file(start, name, _OTHER_KINDS.get(kind, f"of type {bytes([kind])!r}"))
            if kind not in b"123456":  # links, devices and folders have no payload
                position += size + -size % BLOCK
                if position > num_bytes:
                    raise BrokenTar(start, "truncated")
            start, long_name, long_size = position, None, None

    def salvage(self) -> tuple[list[Piece], list[BrokenTar]]:
        """Find all regular files, whatever lies between them, and each place where the tar is corrupt."""
        pieces: list[Piece] = []
        broken: list[BrokenTar] = []
        start: int | None = 0
        while start is not None:
            try:
                for name, offset, size in self.members(start):
                    pieces.append(Piece(name, start, offset, size))
                    start = pieces[-1].end
                break
            except BrokenTar as error:
                broken.append(error)
                start = self.find_header(error.position + BLOCK)
        return pieces, broken

    def find_header(self, position: int) -> int | None:
        """Return the place of the first valid header at or after byte `position`, a multiple of 512, or None."""
        while chunk := self._pread(_SCAN_BYTES, position):
            for start in range(0, len(chunk) - BLOCK + 1, BLOCK):
                block = chunk[start : start + BLOCK]
                if block[257:262] == b"ustar" and _payload_size(block) is not None:
                    return position + start
            position += len(chunk)
        return None

    def _explain(self, header: bytes, position: int, start: int) -> BrokenTar:
        kind = next((kind for magic, kind in _MAGIC.items() if header.startswith(magic)), None)
        if position == 0 and kind is not None:
            return BrokenTar(0, f"compressed with {kind}", f"unpack it to a plain tar: {kind} -d")
        if len(header) < BLOCK:
            what = "truncated: the empty blocks at its end are missing" if position else "no tar, or a truncated one"
            return BrokenTar(start, what)
        return BrokenTar(start, "a corrupt header" if position else "no tar, or a corrupt one")

    def _read_extended(self, position: int, size: int, start: int) -> bytes:
        if size > MAX_TEXT_BYTES:
            raise BrokenTar(start, f"an extended header of {size} bytes")
        text = self.read(position, size)
        if len(text) < size:
            raise BrokenTar(start, "truncated in an extended header")
        return text

    def _check_end(self, position: int) -> None:
        """Refuse data behind the empty block that ends a tar: its members would be lost in silence."""
        place = position
        while chunk := self._pread(_SCAN_BYTES, place):
            if chunk.count(0) < len(chunk):
                what = "an empty block before the end: overwritten, or two tars in one file"
                raise BrokenTar(position, what, "pack it again")
            place += len(chunk)


def _not_a_file(position: int, name: str, kind: str) -> BrokenTar:
    return BrokenTar(position, f"no plain file: {name!r}, {kind}", "pack the tar again without it")


def _payload_size(header: bytes) -> int | None:
    """Return the payload's size, or None if this is no header, or its checksum or its size is wrong.

    The checksum is the sum of all bytes, with its own field read as spaces. The lower half of Adler-32 is one more than
    the sum of the bytes, modulo 65521, and is computed in C: this runs once a member.
    """
    if len(header) < BLOCK:
        return None
    try:
        field = header[148:156]
        checksum = int(field.strip(b"\0 "), 8)
        if ((zlib.adler32(header) & 0xFFFF) - 1 - sum(field) + 256 - checksum) % _ADLER_MODULUS:
            return None
        if header[124] == 0x80:  # GNU tar writes sizes that need more digits to base 256, after a marked byte
            return int.from_bytes(header[125:136], "big")
        size = int(header[124:136].strip(b"\0 ") or b"0", 8)
        return size if size >= 0 else None
    except ValueError:
        return None


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _read_pax(text: bytes, position: int) -> tuple[str | None, int | None]:
    """Return name and size of a pax header: records `LENGTH KEY=VALUE\\n`; LENGTH counts the whole record."""
    name, size = None, None
    start = 0
    try:
        while start < len(text) and text[start]:
            digits = text[start : start + 20].partition(b" ")[0]
            end = start + int(digits)
            key, equals, value = text[start + len(digits) + 1 : end - 1].partition(b"=")
            if not equals or text[end - 1 : end] != b"\n":
                raise ValueError
            if key == b"path":
                name = value.decode("utf-8", "surrogateescape").rstrip("/")
            elif key == b"size":
                size = int(value)
                if size < 0:
                    raise ValueError
            elif key.startswith(b"GNU.sparse."):
                raise BrokenTar(position, "no plain file: a sparse file", "pack the tar again without it")
            start = end
    except ValueError:
        raise BrokenTar(position, "a corrupt pax header") from None
    return name, size
