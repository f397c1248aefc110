"""Find the problems of a shard: of its tar, and of its samples, each image of which is decoded to the last pixel."""

import hashlib
import io
import json
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32
from PIL import Image

from data_prep.shards.samples import MAX_LABELS, Contents, read_label
from data_prep.shards.tar_reader import TarReader
from gcvit.data.image_files import FORMATS, MAX_PIXELS
from gcvit.data.manifest import Manifest, Shard

OURS = {"key", "path", "class", "label"}  # fields of a .json that data_prep.shard wrote


@dataclass(frozen=True)
class Task:
    """One shard with its part of the columns, each [num_samples of the shard]; `first` numbers its first sample.

    `usual` are the fields that every sample has: from them follows which sample of a corrupt tar lost a member.
    """

    folder: Path
    split: str
    shard: Shard
    classes: tuple[str, ...]
    usual: frozenset[str]
    first: int
    offset: np.ndarray
    length: np.ndarray
    label: np.ndarray
    crc32: np.ndarray | None


@dataclass(frozen=True)
class Problem:
    """A problem of a shard, or of the sample of this number in its split; `key` is None if it is lost.

    A problem is not `repairable` if the shard's bytes may be valid.
    """

    split: str
    shard: str
    sample: int | None
    key: str | None
    problem: str
    repairable: bool = True

    def __str__(self) -> str:
        name = self.key or (None if self.sample is None else f"sample {self.sample}")
        return f"{self.shard}: {self.problem}" if name is None else f"{self.shard}: {name}: {self.problem}"


def usual_fields(manifest: Manifest) -> frozenset[str]:
    """Return the fields that all samples of a few shards have: of valid shards if there are any."""
    valid: list[frozenset[str]] = []
    corrupt: list[frozenset[str]] = []
    for number in range(0, len(manifest.shards), 1 + len(manifest.shards) // 4):
        shard = manifest.shards[number]
        try:
            with TarReader(manifest.root / shard.name) as tar:
                contents = Contents(tar)
                is_valid = not contents.broken and tar.num_bytes == shard.num_bytes
        except OSError:
            continue
        offset = manifest.offset[manifest.first[number] : manifest.first[number + 1]]
        fields = _common_fields(contents, offset, is_valid)
        if fields is not None:
            (valid if is_valid else corrupt).append(fields)
    found = valid or corrupt
    return frozenset.intersection(*found) if found else frozenset()


def _common_fields(contents: Contents, offset: np.ndarray, is_valid: bool) -> frozenset[str] | None:
    """Return the fields that all samples have (of a corrupt tar: all samples not beside corruption), or None."""
    keys = [contents.key_at.get(int(place)) for place in offset]
    if not is_valid:  # a key counts only if the next image is there, too: bytes between them may be missing
        pairs = zip(keys, [*keys[1:], None], strict=True)
        keys = [key for key, behind in pairs if behind is not None and key not in contents.beside]
    fields = [frozenset(contents.fields[key]) for key in keys if key is not None]
    return frozenset.intersection(*fields) if fields else None


def make_tasks(manifest: Manifest) -> list[Task]:
    """Make a task for each shard of a manifest."""
    tasks = []
    usual = usual_fields(manifest)
    for shard, begin, end in zip(manifest.shards, manifest.first[:-1], manifest.first[1:], strict=True):
        offset, length, label = (
            np.array(column[begin:end]) for column in (manifest.offset, manifest.length, manifest.label)
        )
        crc32 = None if manifest.crc32 is None else np.array(manifest.crc32[begin:end])
        about = (manifest.root, manifest.split, shard, manifest.classes, usual, int(begin))
        tasks.append(Task(*about, offset, length, label, crc32))
    return tasks


def verify_shard(task: Task) -> list[Problem]:
    """Find the problems of one shard: those of the tar, then those of its samples in their order."""

    def problem(text: str, sample: int | None = None, key: str | None = None, repairable: bool = True) -> Problem:
        return Problem(task.split, task.shard.name, sample, key, text, repairable)

    path = task.folder / task.shard.name
    numbers = range(task.first, task.first + task.shard.num_samples)
    try:
        found = []
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with TarReader(path) as tar:
            if tar.num_bytes != task.shard.num_bytes:
                kind = "truncated" if tar.num_bytes < task.shard.num_bytes else "grown"
                found.append(problem(f"is {kind}: {tar.num_bytes} bytes instead of {task.shard.num_bytes}"))
            elif task.shard.sha256 not in (None, sha256):
                found.append(problem(f"SHA-256 is {sha256} instead of {task.shard.sha256}"))
            if np.any(np.diff(task.offset) <= 0):
                are_distinct = len(np.unique(task.offset)) == len(task.offset)
                found.append(problem("the manifest lists its samples out of order", repairable=are_distinct))
            contents = Contents(tar)
            usual: frozenset[str] = frozenset()
            if contents.broken or tar.num_bytes != task.shard.num_bytes:
                here = _common_fields(contents, task.offset, is_valid=False)
                usual = task.usual if here is None else task.usual & here
            label_of = {name: label for label, name in enumerate(task.classes)}
            found += [problem(f"{error} at byte {error.position}") for error in contents.broken]
            lost_sizes: Counter[int] = Counter()
            for index, sample in enumerate(numbers):
                key = contents.key_at.get(int(task.offset[index]))
                lost_sizes[int(task.length[index])] += key is None
                texts = _verify_sample(task, index, key, contents, usual, label_of)
                found += [problem(text, sample, key) for text in texts]
            for key in _find_surplus(task, contents, label_of):
                # A sample as large as a lost one is that one, moved by missing or additional bytes before it.
                size = contents.fields[key]["image"].size
                is_moved = lost_sizes[size] > 0
                lost_sizes[size] -= is_moved
                found.append(problem("the manifest lacks this sample", key=key, repairable=is_moved))
        return found
    except OSError as error:
        text = f"cannot be read: {error.strerror}"
        # Only a file that is gone is lost. Others may be valid: on an unmounted disk, or of another user.
        if not isinstance(error, FileNotFoundError) or path.is_symlink():
            return [problem(text, repairable=False)]
        return [problem(text), *(problem("cannot be read", sample) for sample in numbers)]


def _verify_sample(
    task: Task, index: int, key: str | None, contents: Contents, usual: frozenset[str], label_of: Mapping[str, int]
) -> list[str]:
    offset, length, expected = (int(column[index]) for column in (task.offset, task.length, task.label))
    if key is None:
        return [f"lost: no image lies at byte {offset}"]
    problems = []
    fields = contents.fields[key]
    if key in contents.twice:
        problems.append("two members have one name")
    if missing := usual - fields.keys():
        problems.append(f"lost: its {', '.join(sorted(missing))}")
    if fields["image"].size != length:
        problems.append(f"has {fields['image'].size} bytes; the manifest says {length}")
    data = contents.tar.read(offset, length)
    if task.crc32 is not None and crc32(data) != task.crc32[index]:
        problems.append(f"crc32 is {crc32(data):08x}; the manifest says {int(task.crc32[index]):08x}")
    problems += _verify_label(task.classes, expected, key, contents, label_of)
    try:
        decode(data)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise errors of many types for corrupt bytes
        problems.append(f"does not decode: {error}")
    return problems


def _verify_label(
    classes: tuple[str, ...], expected: int, key: str, contents: Contents, label_of: Mapping[str, int]
) -> list[str]:
    problems = []
    cls, about = contents.read(key, "cls"), contents.read(key, "json")
    try:
        if (label := read_label(cls, about, label_of)) != expected:
            problems.append(f"{'.json' if cls is None else '.cls'} says {label}; the manifest says {expected}")
    except ValueError as error:
        problems.append(str(error))
    try:
        said = {} if about is None else json.loads(about)
    except (ValueError, RecursionError):
        return [*problems, ".json cannot be read"]
    if isinstance(said, dict) and said.keys() >= OURS:
        name = classes[expected] if 0 <= expected < len(classes) else None
        if name == f"{expected:04d}":  # index knew no names
            name = said["class"]
        wanted = (key, expected, name)
        if (found := (said["key"], said["label"], said["class"])) != wanted:
            problems.append(f".json says {found}; name and manifest say {wanted}")
    return problems


def _find_surplus(task: Task, contents: Contents, label_of: Mapping[str, int]) -> list[str]:
    """Return the keys of samples that are complete but not in the manifest."""
    known = {contents.key_at.get(int(offset)) for offset in task.offset}
    surplus = []
    for key, fields in contents.fields.items():
        if key not in known and key not in contents.twice and "image" in fields and fields["image"].size:
            try:
                label = read_label(contents.read(key, "cls"), contents.read(key, "json"), label_of)
            except ValueError:
                continue
            surplus += [key] if label < MAX_LABELS else []
    return surplus


def decode(data: bytes) -> None:
    """Decode an image to its last pixel. Pillow raises errors of many types for corrupt bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        with Image.open(io.BytesIO(data), formats=[*FORMATS, "PPM"]) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"announces {picture.width} x {picture.height} pixels")
            picture.load()
