"""Where samples come from: class folders of images, their labels, and the keys that name them in a shard."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gcvit.errors import UserError

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".gz", ".7z", ".rar")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
LAYOUT = "SOURCE/CLASS/image files, or SOURCE/train/CLASS and SOURCE/val/CLASS"

# Percent-encoded in a key: every byte that is no printable ASCII; the dot, at which readers of tars split key
# and extension; the percent sign, so that the code can be undone; and the first of two leading underscores,
# since webdataset skips members below a folder named __like_this__.
_CODED = re.compile(rb"[^ -~]|[.%]|^_(?=_)")


class Place(NamedTuple):
    """Where an image's bytes lie: `file` is relative to a source's root; `length` None is the whole file."""

    file: str
    offset: int = 0
    length: int | None = None


class Spans(NamedTuple):
    """Where each sample lies: `length[i]` bytes at `offset[i]` of `files[file[i]]`; columns of shape [N]."""

    files: tuple[str, ...]
    file: np.ndarray
    offset: np.ndarray
    length: np.ndarray


@dataclass(frozen=True, eq=False)
class Source:
    """A split's samples: `paths[i]`, CLASS/name, has label `labels[i]`, an index into `classes`.

    Sorted by class, then by path. `paths` name samples in shards; where their bytes lie is told by `place`.
    `root` is a folder, or a single archive, whose places have the file "". `split_folder` tells that the source has
    splits of its own, so that the shards go to OUT/SPLIT.
    """

    root: Path
    split: str
    classes: tuple[str, ...]
    paths: list[str]
    labels: list[int]
    split_folder: bool = False
    spans: Spans | None = None

    def place(self, index: int) -> Place:
        if self.spans is None:
            return Place(self.paths[index])
        files, file, offset, length = self.spans
        return Place(files[file[index]], int(offset[index]), int(length[index]))


def read_place(root: Path, place: Place) -> bytes:
    """The bytes at a place. Errors: OSError; ValueError where the file ends before."""
    if place.length is None:
        return (root / place.file).read_bytes()
    with open(root / place.file, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), place.length, place.offset)
    if len(data) < place.length:
        raise ValueError(f"ends {place.length - len(data)} bytes before the sample at {place.offset} does")
    return data


def encode_key(path: str) -> str:
    """The key of a file in a shard: its path without extension, percent-encoded to ASCII without dots.

    Folders stay. Two paths have one key only if they differ in nothing but their extensions.
    """
    stem = os.path.splitext(path)[0]
    return _CODED.sub(lambda match: b"%%%02X" % match[0][0], os.fsencode(stem)).decode("ascii")


@contextmanager
def spooled(source: Source, chosen: np.ndarray, folder: Path) -> Iterator[Source]:
    """The source itself; or for one whose samples cannot be read singly (parquet), its `chosen` ones in a file.

    `chosen` are sample numbers; only their places may be asked of the source that this yields. The file lies in
    `folder` and is removed afterwards, as is what a killed run left.
    """
    yield source


def find_sources(
    root: Path,
    split: str | None,
    *,
    classes: Path | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
) -> list[Source]:
    """The splits below `root`: `train` and `val` where it has these folders, else one named `split`.

    Labels number the sorted class folders of `train`, for `val` too. Errors: UserError for a missing, empty
    or unclear source, a class folder without files, a class that only `val` has, two files with one key.
    """
    if not root.is_dir():
        kind = "a file" if root.exists() else "missing"
        cure = "unpack it first" if root.name.endswith(ARCHIVES) else "check the path"
        raise UserError("the source is no directory", got=f"{root} ({kind})", allowed=LAYOUT, cure=cure)
    # A folder `train` that holds folders is a split; one that holds only files may be a class about trains.
    splits = [name for name in ("train", "val") if (root / name).is_dir() and _list_folder(root / name)[0]]
    if not splits:
        return [_scan(root, split or "train", None)]
    if split is not None:
        raise UserError(
            f"--split has no effect: {root} has its own splits",
            got=f"--split {split}",
            cure=f"leave it out, or name one folder: {root / splits[0]}",
        )
    if splits == ["val"]:
        raise UserError(
            "labels come from train's classes, and there is no train folder",
            got=root,
            allowed=LAYOUT,
            cure=f"add it, or shard {root / 'val'} alone with --split val",
        )
    # Archives may lie above train/ and val/: that is where ImageNet's own lie once they are unpacked.
    _refuse_loose(root, [name for name in _list_folder(root)[1] if not name.lower().endswith(ARCHIVES)])
    train = _scan(root / "train", "train", None, True)
    return [train] if splits == ["train"] else [train, _scan(root / "val", "val", train.classes, True)]


def _scan(root: Path, split: str, classes: tuple[str, ...] | None, split_folder: bool = False) -> Source:
    """Read the names in a class-folder tree; `classes` fixes the labels, None takes its own folders."""
    folders, files = _list_folder(root)
    _refuse_loose(root, files)
    if not folders:
        raise UserError("the source holds no class folders", got=root, allowed=LAYOUT, cure="check the path")
    if classes is not None and (unknown := sorted(set(folders) - set(classes))):
        raise UserError(
            f"{split} has {len(unknown)} class folders that train lacks",
            got=", ".join(str(root / name) for name in unknown[:3]),
            allowed=f"the {len(classes)} classes of train",
            cure="rename or remove them, or add their images to train",
        )
    label_of = {name: label for label, name in enumerate(classes or sorted(folders))}
    paths: list[str] = []
    labels: list[int] = []
    for name in sorted(folders):
        found = sorted(_walk(root, name))
        if not found:
            raise UserError("a class folder holds no images", got=root / name, cure="remove it or fill it")
        _refuse_collisions(root, found)
        paths += found
        labels += [label_of[name]] * len(found)
    return Source(root, split, tuple(label_of), paths, labels, split_folder)


def _walk(root: Path, folder: str) -> Iterator[str]:
    folders, files = _list_folder(root / folder)
    for name in files:
        yield f"{folder}/{name}"
    for name in folders:
        yield from _walk(root, f"{folder}/{name}")


def _list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in `folder`; links are followed, hidden names left out."""
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise UserError("cannot read a source folder", got=f"{folder} ({error.strerror})") from None
    return folders, files


def _refuse_loose(root: Path, files: list[str]) -> None:
    """Images and archives beside the class folders would be lost in silence; other files may stay."""
    for name in sorted(files):
        if name.lower().endswith(ARCHIVES):
            what, cure = "an archive in place of a class folder", "unpack or remove it"
        elif name.lower().endswith(PICTURES):
            what, cure = "an image outside a class folder", "move or remove it"
        else:
            continue
        raise UserError(what, got=root / name, allowed=LAYOUT, cure=cure)


def _refuse_collisions(root: Path, paths: list[str]) -> None:
    path_of: dict[str, str] = {}
    for path in paths:
        stem = os.path.splitext(path)[0]
        other = path_of.setdefault(stem, path)
        if other != path:
            raise UserError(
                f"two files have one key, {encode_key(path)}",
                got=f"{root / other} and {root / path}",
                allowed="names that differ in more than the extension",
                cure="rename or remove one",
            )
