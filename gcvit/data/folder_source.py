"""Read samples from a tree of class folders, DATA_DIR/SPLIT/CLASS/*.jpg: one file each, read whole."""

import hashlib
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gcvit.data.image_files import has_image_suffix, list_folder, walk_files
from gcvit.errors import UserError

LAYOUT = "DATA_DIR/train/CLASS/*.jpg and DATA_DIR/val/CLASS/*.jpg"


class FolderSource:
    """One split of a class-folder tree, sorted by class and then by path; see `gcvit.data.source.Source`."""

    def __init__(
        self,
        root: Path,
        classes: tuple[str, ...],
        paths: npt.NDArray[np.bytes_],
        length: npt.NDArray[np.uint32],
        label: npt.NDArray[np.int32],
    ):
        self.root, self.classes = root, classes
        self.length, self.label = length, label
        self._paths = paths  # fixed-width bytes: a list of a million texts would be slow to hand to each worker

    @property
    def num_samples(self) -> int:
        return len(self.label)

    @cached_property
    def first(self) -> npt.NDArray[np.int64]:
        """Return the first sample of each class folder, then N; folders stand in for shards."""
        return np.concatenate([[0], np.flatnonzero(np.diff(self.label)) + 1, [self.num_samples]]).astype(np.int64)

    @cached_property
    def digest(self) -> str:
        """Compute the SHA-256 of classes, paths, labels and file sizes, in hex; contents are not read."""
        digest = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        for column in (self._paths, self.label, self.length):
            digest.update(f"{column.dtype} ".encode() + column.tobytes())
        return digest.hexdigest()

    def prefetch(self, shards: Iterable[int]) -> None:
        """Return None: the files are local."""

    @property
    def is_chunked(self) -> bool:
        return False

    def fetch(self, begin: int, end: int) -> list[memoryview]:
        return [memoryview(self._read(index)) for index in range(begin, end)]

    def check(self, index: int, content: memoryview) -> None:
        """Accept any content: files have no checksums, and decoding shows whether one is an image."""

    def _read(self, index: int) -> bytes:
        try:
            with open(self.root / self.name(index), "rb") as file:
                return file.read()
        except OSError as error:
            raise UserError("cannot read a sample", got=f"{self.root / self.name(index)} ({error.strerror})") from None

    def name(self, index: int) -> str:
        return os.fsdecode(self._paths[index])


def open_folder(root: Path, classes: tuple[str, ...] | None = None) -> FolderSource:
    """List the images of the class folders in `root`.

    Args:
        classes: fixes the labels; None numbers the sorted folders.

    Raises:
        UserError: no class folders, one without images, one that `classes` lacks, or an unreadable tree.
    """
    folders = class_folders(root)
    if not folders:
        raise UserError(f"no class folders and no shards: {root}", expected=LAYOUT, hint="check --data_dir")
    classes = tuple(folders) if classes is None else classes
    if unknown := sorted(set(folders) - set(classes)):
        raise UserError(
            f"{root} has {len(unknown)} class folders that train lacks",
            got=", ".join(unknown[:3]),
            expected=f"the {len(classes)} classes of train",
            hint="rename or remove them",
        )
    label_of = {name: label for label, name in enumerate(classes)}
    paths: list[bytes] = []
    length: list[int] = []
    label: list[int] = []
    for name in folders:
        files = sorted(path for path in walk_files(root, name) if has_image_suffix(path))
        if not files:
            raise UserError("a class folder holds no images", got=root / name, hint="fill it or remove it")
        paths += map(os.fsencode, files)
        length += [_file_size(root / path) for path in files]
        label += [label_of[name]] * len(files)
    return FolderSource(root, classes, np.array(paths), np.array(length, np.uint32), np.array(label, np.int32))


def class_folders(root: Path) -> list[str]:
    """List the names of the class folders in `root`, sorted; hidden folders are left out."""
    return sorted(list_folder(root)[0])


def _file_size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise UserError("cannot read a sample", got=f"{path} ({error.strerror})") from None
