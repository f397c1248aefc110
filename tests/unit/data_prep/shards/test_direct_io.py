"""What is appended to a file arrives on disk, whole or with an error, on every kind of file system."""

import errno
import os
from pathlib import Path

import pytest

from data_prep.shards import direct_io
from data_prep.shards.direct_io import BUFFER_BYTES, DirectFile

LENGTHS = [0, 1, 4096, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 2 * BUFFER_BYTES + 4095]


def write_file(path: Path, *parts: bytes) -> None:
    with DirectFile(path) as file:
        for part in parts:
            file.append(part)
        file.finish()


@pytest.mark.parametrize("has_direct", [True, False])
@pytest.mark.parametrize("lengths", [LENGTHS, [], [1], [BUFFER_BYTES], [700_001] * 9])
def test_a_direct_file_holds_what_was_appended(tmp_path, monkeypatch, has_direct, lengths):
    if not has_direct:
        monkeypatch.setattr(direct_io, "_DIRECT", 0)
    parts = [os.urandom(length) for length in lengths]
    write_file(tmp_path / "file", *parts)
    assert (tmp_path / "file").read_bytes() == b"".join(parts)


def test_a_file_system_that_refuses_direct_writes_gets_plain_ones(tmp_path, monkeypatch):
    """At opening, and at a write."""
    open_file, write, refused = os.open, os.write, []

    def refusing_open(path, flags, *mode):
        if flags & os.O_DIRECT:
            refused.append("open")
            raise OSError(errno.EINVAL, "Invalid argument")
        return open_file(path, flags, *mode)

    def refusing_write(descriptor, data):
        if len(refused) == 1:
            refused.append("write")
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, data)

    monkeypatch.setattr(direct_io.os, "open", refusing_open)
    monkeypatch.setattr(direct_io.os, "write", refusing_write)
    data = os.urandom(BUFFER_BYTES + 5)
    write_file(tmp_path / "file", data)
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == data
    assert refused == ["open", "write"]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(direct_io.os, "write", lambda descriptor, data: write(descriptor, data[:99_999]))
    data = os.urandom(BUFFER_BYTES + 5)
    write_file(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == data


def test_an_error_of_the_disk_is_raised(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_io.os, "write", full)
    for num_bytes in (1, BUFFER_BYTES, 5 * BUFFER_BYTES):
        with pytest.raises(OSError, match="No space"):
            write_file(tmp_path / "file", bytes(num_bytes))
