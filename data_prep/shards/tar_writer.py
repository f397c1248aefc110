"""Write one shard: a WebDataset tar, whole or not at all.

A sample is three members: KEY.jpg (or the true extension of its content, its bytes untouched unless it is
re-encoded), KEY.cls (the label as text) and KEY.json (key, original path, class, label).
"""

import hashlib
import json
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32

from data_prep.images import Reduction, image_extension, reduce_image
from data_prep.shards.byte_range import Place, read_place
from data_prep.shards.direct_io import DirectFile
from data_prep.shards.sidecar import Sidecar, write_sidecar
from gcvit.data.manifest import Shard
from gcvit.errors import UserError
from gcvit.runtime.atomic_write import temporary_path

BLOCK = tarfile.BLOCKSIZE
_PADDING = [bytes(length) for length in range(BLOCK)]
_NAME_BYTES = 100  # the longest name in a header without a prefix

# A regular file of mode 644 with mtime, uid and gid 0 and no names of users, as tarfile writes it. Its checksum is
# the sum of all bytes, with its own field read as spaces.
_EMPTY_NAME = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_BEFORE_SIZE, _AFTER_SIZE, _AFTER_CHECKSUM = _EMPTY_NAME[_NAME_BYTES:124], _EMPTY_NAME[135:148], _EMPTY_NAME[155:]
_SUM = sum(_BEFORE_SIZE + _AFTER_SIZE + _AFTER_CHECKSUM) + 7 * ord(" ")

# Percent-encoded in a key: every byte that is no printable ASCII; the dot, at which readers of tars split key
# and extension; the percent sign, so that the code can be undone; and the first of two leading underscores,
# since webdataset skips members below a folder named __like_this__.
_CODED = re.compile(rb"[^ -~]|[.%]|^_(?=_)")


@dataclass(frozen=True)
class Task:
    """One shard: sample i has the bytes at `places[i]` below `root`, the name `paths[i]` and the label `labels[i]`.

    If `write` is False, the sidecar is computed and nothing written. `plan` is the digest for the sidecar.
    """

    root: Path
    places: list[Place]
    paths: list[str]
    labels: list[int]
    tar_path: Path
    plan: str
    reduction: Reduction | None
    write: bool


@dataclass(frozen=True)
class Result:
    """A shard's sidecar; or None and the paths of the files that are no images, each with the reason."""

    sidecar: Sidecar | None
    refused: list[str]


class TarWriter:
    """Append samples to a tar and hash its bytes; with `file` None, nothing is written."""

    def __init__(self, file: DirectFile | None):
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()
        self._file = file

    def add(self, members: list[tuple[str, bytes]]) -> int:
        """Append a sample's members, (name, payload); return the offset of the first one's payload."""
        (name, data), *others = members
        head = tar_header(name, len(data))
        offset = self.num_bytes + len(head)
        tail = [_PADDING[-len(data) % BLOCK]]
        for other, text in others:
            tail += (tar_header(other, len(text)), text, _PADDING[-len(text) % BLOCK])
        self.append(head, data, b"".join(tail))
        return offset

    def finish(self) -> None:
        """Write the two empty blocks that end a tar, fill its last record as tar does, and flush all to disk."""
        end = self.num_bytes + 2 * BLOCK
        self.append(bytes(2 * BLOCK + -end % tarfile.RECORDSIZE))
        if self._file is not None:
            self._file.finish()

    def append(self, *parts: bytes) -> None:
        """Append whole blocks as they are."""
        for part in parts:
            self.num_bytes += len(part)
            self.sha256.update(part)
            if self._file is not None:
                self._file.append(part)


def tar_header(name: str, size: int) -> bytes:
    """Build the header of a regular file, byte for byte as tarfile does: one block, or more for a name beyond USTAR.

    Args:
        name: Name of the member, in ASCII.
        size: Size of the payload in bytes.
    """
    if len(name) <= _NAME_BYTES and size < 8**11:
        octal = b"%011o" % size
        text = name.encode("ascii")
        checksum = b"%06o\0" % (_SUM + sum(text) + sum(octal))
        return b"".join((text.ljust(_NAME_BYTES, b"\0"), _BEFORE_SIZE, octal, _AFTER_SIZE, checksum, _AFTER_CHECKSUM))
    info = tarfile.TarInfo(name)
    info.size = size
    try:
        return info.tobuf(tarfile.USTAR_FORMAT)
    except ValueError:  # a name beyond USTAR's 100 + 155 bytes; every tar reader supports pax headers too
        return info.tobuf(tarfile.PAX_FORMAT)


def write_shard(task: Task) -> Result:
    """Write a shard under a temporary name, flush it to disk, rename it, then write its sidecar.

    A shard with a file that is no image is not written.

    Raises:
        UserError: Writing fails; no part of the shard remains.
    """
    if not task.write:
        return _fill(TarWriter(None), task)
    temporary = temporary_path(task.tar_path)
    try:
        with DirectFile(temporary) as file:
            result = _fill(TarWriter(file), task)
        if result.sidecar is not None:
            os.replace(temporary, task.tar_path)
            write_sidecar(task.tar_path, task.plan, result.sidecar)
    except OSError as error:
        raise UserError(
            "cannot write a shard",
            got=f"{task.tar_path} ({error.strerror})",
            hint="resolve the error and start the same command again; complete shards are kept",
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return result


def _fill(tar: TarWriter, task: Task) -> Result:
    offsets, lengths, crcs = [], [], []
    refused: list[str] = []
    num_source_bytes = 0
    for place, path, label in zip(task.places, task.paths, task.labels, strict=True):
        try:
            original = read_place(task.root, place)
            data = original if task.reduction is None else reduce_image(original, task.reduction)
            members = sample_members(data, path, label)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            refused.append(f"{path} ({reason})")
            continue
        if refused:  # the shard is not written, but all its files are checked, to report them together
            continue
        offsets.append(tar.add(members))
        lengths.append(len(data))
        crcs.append(crc32(data))
        num_source_bytes += len(original)
    if refused:
        return Result(None, refused)
    tar.finish()
    shard = Shard(task.tar_path.name, len(offsets), tar.num_bytes, tar.sha256.hexdigest())
    columns: dict[str, np.ndarray] = {
        "offset": np.array(offsets, np.int64),
        "length": np.array(lengths, np.uint32),
        "label": np.array(task.labels, np.int32),
        "crc32": np.array(crcs, np.uint32),
    }
    return Result(Sidecar(shard, columns, num_source_bytes), [])


def sample_members(data: bytes, path: str, label: int) -> list[tuple[str, bytes]]:
    """Build a sample's members, (name, payload), the image first.

    Raises:
        ValueError: `data` is no image of a known format.
    """
    key = encode_key(path)
    about = {"key": key, "path": path, "class": path.split("/")[0], "label": label}
    return [
        (f"{key}.{image_extension(data)}", data),
        (f"{key}.cls", str(label).encode()),
        (f"{key}.json", json.dumps(about).encode()),
    ]


def encode_key(path: str) -> str:
    """Encode a path as the key of a shard: without its extension, percent-encoded to ASCII without dots.

    Folders stay. Two paths have one key only if they differ in nothing but their extensions.
    """
    stem = os.path.splitext(path)[0]
    return _CODED.sub(lambda match: b"%%%02X" % match[0][0], os.fsencode(stem)).decode("ascii")
