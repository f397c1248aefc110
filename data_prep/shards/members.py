"""The files in a tar and the bytes they lie in, from the headers alone; also where the tar lies in another one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from gcvit.errors import UserError

_BLOCK = 512
_EMPTY = bytes(_BLOCK)
_SCAN_BYTES = 1 << 20
_LONGEST_HEADER = 1 << 20  # an extended header beyond this holds no name
_COPY = "copy or fetch it again"
_MAGICS = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ\0": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


class Member(NamedTuple):
    """A file in a tar: `length` bytes at `offset` of the outermost file."""

    name: str
    offset: int
    length: int


@contextmanager
def open_tar(path: Path) -> Iterator[tuple[int, int]]:
    """A descriptor of the file, and its size in bytes. Errors: UserError where reading fails, then or later."""
    try:
        with open(path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):  # no reading ahead: most of it would be skipped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            yield file.fileno(), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError("cannot read an archive", got=f"{path} ({error.strerror})") from None


def list_members(descriptor: int, where: str, begin: int, length: int) -> Iterator[Member]:
    """The files of the tar in the `length` bytes from `begin`, in their order; folders are passed over.

    Knows ustar, GNU's long names and pax headers. `where` names the tar in messages. Errors: UserError for a tar that
    is compressed, corrupt or truncated, and for links, devices and sparse files; OSError.
    """
    position, end = begin, begin + length
    pax: dict[bytes, bytes] = {}  # what extended headers say of the next member
    while True:
        header = os.pread(descriptor, max(0, min(_BLOCK, end - position)), position)
        if header == _EMPTY:
            break
        try:
            if len(header) < _BLOCK or sum(header) - sum(header[148:156]) + 8 * ord(" ") != _number(header[148:156]):
                raise ValueError
            size = int(pax[b"size"]) if b"size" in pax else _number(header[124:136])
        except ValueError:
            raise _explain(header, where, position - begin) from None
        kind, payload = header[156:157], position + _BLOCK
        position = payload + -(-size // _BLOCK) * _BLOCK
        if kind == b"5":  # some writers gave folders a size, of no bytes
            position, pax = payload, {}
        elif position > end:
            raise UserError("a tar is truncated", got=f"{where} in the member at byte {payload - begin}", hint=_COPY)
        elif kind in (b"0", b"\0", b"7"):
            name = pax.get(b"path") or _name(header)
            if kind == b"0" or not name.endswith(b"/"):  # a folder, before tars had a mark for it
                if any(key.startswith(b"GNU.sparse") for key in pax):
                    raise _refuse(where, name, "a sparse file")
                yield Member(os.fsdecode(name), payload, size)
            pax = {}
        elif kind in (b"x", b"L"):
            if size > _LONGEST_HEADER:
                raise _explain(header, where, payload - _BLOCK - begin)
            data = os.pread(descriptor, size, payload)
            pax |= _parse_pax(data, where) if kind == b"x" else {b"path": data.split(b"\0", 1)[0]}
        elif kind not in (b"g", b"K", b"V"):  # remarks on the whole tar, a link's target, the tar's label
            raise _refuse(where, pax.get(b"path") or _name(header), _KINDS.get(kind, f"of type {kind!r}"))
    while position < end:  # an empty block ends a tar, and only such follow, or members would be lost in silence
        rest = os.pread(descriptor, min(_SCAN_BYTES, end - position), position)
        if rest.count(0) < len(rest) or not rest:
            got = f"{where} has bytes behind its end at byte {position - begin}"
            raise UserError("two tars in one file, or a corrupt one", got=got, hint="pack it again")
        position += len(rest)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""  # GNU keeps times there
    return prefix + b"/" + name if prefix else name


def _number(field: bytes) -> int:
    """A number in octal digits, or where it is too large for them in base 256. Errors: ValueError."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits.startswith(b"-"):  # which int would take: a step back, and round and round
        raise ValueError
    return int(digits, 8) if digits else 0


def _parse_pax(data: bytes, where: str) -> dict[bytes, bytes]:
    """The records b"LENGTH KEY=VALUE\\n" of an extended header, where LENGTH counts the whole record."""
    records = {}
    while data.strip(b"\0"):
        digits, blank, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, sign, value = data[len(digits) + 1 : length - 1].partition(b"=")
        if not (blank and sign and length <= len(data) and data[length - 1 : length] == b"\n"):
            raise UserError("a tar is corrupt", got=f"{where}: an extended header cannot be read", hint=_COPY)
        records[key], data = value, data[length:]
    if not records.get(b"size", b"0").isdigit():
        raise UserError("a tar is corrupt", got=f"{where}: a size of {records[b'size']!r}", hint=_COPY)
    return records


def _explain(header: bytes, where: str, position: int) -> UserError:
    """Why there is no header in this place."""
    command = next((command for magic, command in _MAGICS.items() if header.startswith(magic)), None)
    if position == 0 and command is not None:
        what, hint = "a compressed archive, whose members cannot be read singly", f"unpack it to a plain tar: {command}"
        return UserError(what, got=where, hint=hint)
    if len(header) < _BLOCK:
        return UserError("a tar is truncated", got=f"{where} at byte {position}", hint=_COPY)
    return UserError("no tar, or a corrupt one", got=f"{where} at byte {position}", hint=_COPY)


def _refuse(where: str, name: bytes, kind: str) -> UserError:
    got = f"{where}: {os.fsdecode(name)!r}, {kind}"
    return UserError("a member is no plain file", got=got, hint="pack the tar again without it")
