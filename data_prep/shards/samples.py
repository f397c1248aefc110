"""Find the samples of any tar, ours or one made by others: an image and a label under one key of webdataset.

timm's ImageNet has KEY.jpg and KEY.cls with the label as text; open_clip has KEY.jpg and KEY.json with a label among
its fields. `index_tar` finds them in valid tars, and skips the images unless checksums are asked for. `Contents` finds
those that are left in corrupt tars.
"""

import hashlib
import json
import re
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shards.tar_reader import MAX_TEXT_BYTES, BrokenTar, Piece, TarReader
from gcvit.data.manifest import Shard

IMAGES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"))
MAX_LABELS = 1_000_000  # where classes have no names: each label up to the largest becomes a class
_CHUNK_BYTES = 1 << 20
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset 1.0.2


@dataclass(frozen=True)
class Task:
    """One tar to index; `label_of` maps the names of classes, if these are known, to labels."""

    path: Path
    label_of: dict[str, int]
    checksums: bool


@dataclass(frozen=True)
class Result:
    """A tar and its part of the columns; `problems` names the samples that are left out.

    `refused` is the reason if the tar cannot be indexed, else None.
    """

    shard: Shard
    columns: dict[str, np.ndarray]
    problems: list[str]
    refused: str | None = None


def index_tar(task: Task) -> Result:
    """Find the samples of one tar: keys with one image and one label, their members in any order."""
    try:
        with TarReader(task.path) as tar:
            found, problems = _find_samples(tar, task.label_of)
            if not found:
                raise BrokenTar(tar.num_bytes, f"no samples; {problems[0] if problems else 'no images or labels'}")
            offsets, lengths, labels = zip(*found, strict=True)
            columns: dict[str, np.ndarray] = {
                "offset": np.array(offsets, np.int64),
                "length": np.array(lengths, np.uint32),
                "label": np.array(labels, np.int32),
            }
            sha256 = None
            if task.checksums:
                sha256, columns["crc32"] = _hash(tar, offsets, lengths)
            return Result(Shard(task.path.name, len(found), tar.num_bytes, sha256), columns, problems)
    except BrokenTar as error:
        refused = f"{error} (at byte {error.position:,})"
    except OSError as error:
        refused = str(error.strerror)
    return Result(Shard(task.path.name, 0, 0, None), {}, [], refused)


def _find_samples(tar: TarReader, label_of: Mapping[str, int]) -> tuple[list[tuple[int, int, int]], list[str]]:
    """Return (offset, length, label) of each sample, in the order of the images; and a line for each unusable key."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, bytes] = {}
    abouts: dict[str, bytes] = {}
    twice: set[str] = set()
    fields: dict[str, dict[str, Any]] = dict.fromkeys(IMAGES, images) | {"cls": labels, "json": abouts}
    for name, offset, size in tar.members():
        key, extension = split_name(name)
        field = fields.get(extension)
        if field is None:
            continue
        if key in field:
            twice.add(key)
        field[key] = (offset, size) if field is images else tar.read(offset, min(size, MAX_TEXT_BYTES))
    samples = []
    problems = [f"{key}: no image" for key in sorted((labels.keys() | abouts.keys()) - images.keys())]
    for key, (offset, size) in images.items():
        try:
            if key in twice:
                raise ValueError("two images, two .cls or two .json")
            if not 0 < size < 2**32:
                raise ValueError(f"its image has {size} bytes")
            label = read_label(labels.get(key), abouts.get(key), label_of)
            if not label_of and label >= MAX_LABELS:
                raise ValueError(f"its label is {label:,}; without names of classes it must be below {MAX_LABELS:,}")
            samples.append((offset, size, label))
        except ValueError as error:
            problems.append(f"{key}: {error}")
    return sorted(samples), problems


def _hash(tar: TarReader, offsets: Sequence[int], lengths: Sequence[int]) -> tuple[str, np.ndarray]:
    """Compute SHA-256 of the tar and crc32 of its images, which are in the order of `offsets`, in one pass."""
    sha256 = hashlib.sha256()
    crcs = []
    position = 0

    def read_to(end: int) -> Iterator[bytes]:
        nonlocal position
        while position < end:
            chunk = tar.read(position, min(_CHUNK_BYTES, end - position))
            if not chunk:
                raise BrokenTar(position, "truncated while it was read")
            sha256.update(chunk)
            position += len(chunk)
            yield chunk

    for offset, length in zip(offsets, lengths, strict=True):
        for _ in read_to(offset):
            pass
        crc = 0
        for chunk in read_to(offset + length):
            crc = zlib.crc32(chunk, crc)
        crcs.append(crc)
    for _ in read_to(tar.num_bytes):
        pass
    return sha256.hexdigest(), np.array(crcs, np.uint32)


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and lower-case extension, as webdataset does: mostly at the first dot.

    A name that webdataset ignores belongs to no sample: it is its own key, with an empty extension. webdataset's own
    function is `webdataset.tariterators.base_plus_ext`, which a test compares with this one. To import it loads torch.
    """
    key, _, extension = name.partition(".")
    if not key or "/" in extension:  # hidden, or a dot in a folder's name
        match = _NAME.match(name)
        key, extension = match.groups() if match else (name, "")
    return key, extension.lower()


def read_label(cls: bytes | None, about: bytes | None, label_of: Mapping[str, int]) -> int:
    """Return a sample's label from its `.cls`, or else from the field label, cls or class of its `.json`.

    Both hold a number, or the name of a class in `label_of`.

    Raises:
        ValueError: There is no label, or no valid one; the message says why.
    """
    if cls is not None:
        return int(cls) if cls.isdigit() and len(cls) < 10 else _as_label(cls.decode("utf-8", "replace"), label_of)
    if about is None:
        raise ValueError("no label: neither .cls nor .json")
    try:
        fields = json.loads(about)
    except (ValueError, RecursionError):
        raise ValueError("its .json cannot be read") from None
    if not isinstance(fields, dict):
        raise ValueError("its .json holds no fields")
    for name in ("label", "cls", "class"):
        if name in fields:
            return _as_label(fields[name], label_of)
    raise ValueError("its .json has no field label, cls or class")


def _as_label(value: object, label_of: Mapping[str, int]) -> int:
    text = value.strip() if isinstance(value, str) else ""
    if type(value) is int:
        label = value
    elif text.isascii() and text.removeprefix("-").isdigit() and len(text) < 20:
        label = int(text)
    elif text in label_of:
        label = label_of[text]
    else:
        raise ValueError(f"its label is neither a number nor the name of a class: {str(value)[:40]!r}")
    if not 0 <= label < 2**31:
        raise ValueError(f"its label is {label}")
    return label


class Contents:
    """The members that can be found in a tar, valid or corrupt, by key and field: "image" or an extension.

    Attributes:
        members: All of them with their keys, in the order of the tar.
        key_at: The key of the image at a byte.
        twice: Keys with two members of one field.
        broken: Places where the tar is corrupt.
        beside: Keys before and behind such places, which may have lost members there.
    """

    def __init__(self, tar: TarReader):
        self.tar = tar
        pieces, self.broken = tar.salvage()
        self.fields: dict[str, dict[str, Piece]] = {}
        self.key_at: dict[int, str] = {}
        self.members: list[tuple[str, Piece]] = []
        self.twice: set[str] = set()
        for piece in pieces:
            key, extension = split_name(piece.name)
            self.members.append((key, piece))
            field = "image" if extension in IMAGES else extension
            fields = self.fields.setdefault(key, {})
            if field in fields:
                self.twice.add(key)
            fields[field] = piece
            if field == "image":
                self.key_at[piece.offset] = key
        starts = [piece.start for piece in pieces]
        self.beside: set[str] = set()
        for error in self.broken:
            behind = bisect_left(starts, error.position)
            self.beside |= {key for key, _ in self.members[max(0, behind - 1) : behind + 1]}

    def pieces(self, key: str) -> list[Piece]:
        """Return the members of a sample, in the order of the tar."""
        return sorted(self.fields[key].values(), key=lambda piece: piece.start)

    def read(self, key: str, field: str) -> bytes | None:
        """Read a field of a sample, at most `MAX_TEXT_BYTES`; None if the sample lacks it."""
        piece = self.fields[key].get(field)
        return None if piece is None else self.tar.read(piece.offset, min(piece.size, MAX_TEXT_BYTES))
