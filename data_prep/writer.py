"""Writes one shard: a WebDataset tar, whole or not at all.

A sample is three members: KEY.jpg (or the true extension of its content, its bytes untouched), KEY.cls (the
label as text) and KEY.json (key, original path, class, label).
"""

import hashlib
import json
import os
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.sources import encode_key, image_extension
from gcvit.data.manifest import Shard, sync_folder
from gcvit.errors import UserError


@dataclass(frozen=True)
class Task:
    """One shard to write, or only to compute where `write` is False."""

    root: Path
    paths: list[str]
    labels: list[int]
    tar_path: Path
    write: bool


@dataclass(frozen=True)
class Result:
    """A shard and its part of the columns; or the file that no shard can hold, if `refused` is not None."""

    shard: Shard
    columns: dict[str, np.ndarray]
    refused: str | None = None


class TarWriter:
    """Appends members to a tar and hashes it on the way; `file` None only computes."""

    def __init__(self, file: BinaryIO | None):
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()
        self._file = file

    def add(self, name: str, data: bytes) -> int:
        """Append a member; return the offset of its payload."""
        info = tarfile.TarInfo(name)  # mtime, uid, gid 0, mode 644, no names of users
        info.size = len(data)
        try:
            header = info.tobuf(tarfile.USTAR_FORMAT)
        except ValueError:  # a name beyond USTAR's 100 + 155 bytes; every tar reader knows pax headers too
            header = info.tobuf(tarfile.PAX_FORMAT)
        offset = self.num_bytes + len(header)
        self._append(header)
        self._append(data)
        self._append(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def close(self) -> None:
        """Two empty blocks end a tar, and tar fills its last record."""
        self._append(bytes(2 * tarfile.BLOCKSIZE))
        self._append(bytes(-self.num_bytes % tarfile.RECORDSIZE))

    def _append(self, data: bytes) -> None:
        self.sha256.update(data)
        self.num_bytes += len(data)
        if self._file is not None:
            self._file.write(data)


def write_shard(task: Task) -> Result:
    """Write a shard under a temporary name, flush it to disk, rename it. Errors: UserError if that fails."""
    if not task.write:
        return _fill(TarWriter(None), task)
    temporary = Path(f"{task.tar_path}.tmp")
    try:
        with open(temporary, "wb", buffering=1 << 20) as file:
            result = _fill(TarWriter(file), task)
            if result.refused is None:
                file.flush()
                os.fsync(file.fileno())
        if result.refused is None:
            os.replace(temporary, task.tar_path)
            sync_folder(task.tar_path.parent)
    except OSError as error:
        raise UserError(
            "cannot write a shard",
            got=f"{temporary} ({error.strerror})",
            cure="mend that and start the same command again",
        ) from None
    return result


def _fill(tar: TarWriter, task: Task) -> Result:
    offsets, lengths, crcs = [], [], []
    refused = None
    for path, label in zip(task.paths, task.labels, strict=True):
        try:
            data = (task.root / path).read_bytes()
            extension = image_extension(data)
        except (OSError, ValueError) as error:
            refused = f"{task.root / path} ({error.strerror if isinstance(error, OSError) else error})"
            break
        key = encode_key(path)
        about = {"key": key, "path": path, "class": path.split("/")[0], "label": label}
        offsets.append(tar.add(f"{key}.{extension}", data))
        lengths.append(len(data))
        crcs.append(zlib.crc32(data))
        tar.add(f"{key}.cls", str(label).encode())
        tar.add(f"{key}.json", json.dumps(about).encode())
    tar.close()
    shard = Shard(task.tar_path.name, len(offsets), tar.num_bytes, tar.sha256.hexdigest())
    columns: dict[str, np.ndarray] = {
        "offset": np.array(offsets, np.int64),
        "length": np.array(lengths, np.uint32),
        "label": np.array(task.labels[: len(offsets)], np.int32),
        "crc32": np.array(crcs, np.uint32),
    }
    return Result(shard, columns, refused)
