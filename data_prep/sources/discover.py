"""Find the samples of a source: class folders, tars or parquet files; with their labels and keys in a shard."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.shards.byte_range import Place
from data_prep.shards.tar_writer import encode_key
from data_prep.sources.archives import Spans, first_member, scan_class_tars, scan_nested, scan_validation
from data_prep.sources.class_folders import ARCHIVES, LAYOUT, group_classes, list_tree, refuse_loose
from data_prep.sources.class_map import read_class_map
from data_prep.sources.parquet import Rows, find_parquet, scan_parquet, spool_rows
from data_prep.sources.val_split import choose_val
from gcvit.data.image_files import list_folder
from gcvit.errors import UserError

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
KIT = "ILSVRC2012_devkit_t12.tar.gz"
KINDS = (
    f"a folder of class folders, of {TRAIN_TAR} and {VAL_TAR}, of CLASS.tar or of *.parquet; or one of ILSVRC's tars"
)


@dataclass(frozen=True, eq=False)
class Source:
    """A split's samples: `paths[i]`, CLASS/name, has label `labels[i]`, an index into `classes`.

    Sorted by class, then by path. `paths` name samples in shards; `place` returns their byte ranges. `root` is a
    folder, or a single tar, whose places have the file "". `split_folder` is True if the source has splits: its shards
    are written to OUT/SPLIT. `where` is None if each sample is a file of its own, at `paths`.
    """

    root: Path
    split: str
    classes: tuple[str, ...]
    paths: list[str]
    labels: list[int]
    split_folder: bool = False
    where: Spans | Rows | None = None

    def place(self, index: int) -> Place:
        """Return the byte range of a sample."""
        if self.where is None:
            return Place(self.paths[index])
        assert isinstance(self.where, Spans), "rows of parquet files have no place until they are spooled"
        files, file, offset, length = self.where
        return Place(files[file[index]], int(offset[index]), int(length[index]))


class _Part(NamedTuple):
    """A split before its classes have numbers; fields as those of `Source`."""

    root: Path
    split: str
    paths: list[str]
    where: Spans | Rows | None = None


class _Found(NamedTuple):
    """The parts of a source; `classes` None means those of the first part, in the order of their names."""

    parts: list[_Part]
    has_splits: bool
    classes: tuple[str, ...] | None = None


def find_sources(
    root: Path,
    split: str | None,
    *,
    classes: Path | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
) -> list[Source]:
    """Find the splits in `root`: `train` and `val` if it has them, else one named `split` (None: `train`).

    Labels number the sorted classes of `train`, for `val` too; parquet files have their own.

    Args:
        root: One of KINDS.
        classes: File whose lines number the classes (see `read_class_map`); some may have no images.
        val_fraction: Share of the samples for a `val` split, if there is none (see `choose_val`).
        seed: Seed of that choice.

    Raises:
        UserError: The source is missing, empty, ambiguous, corrupt or compressed; a class has no files or is not in
            train; or two files have one key.
    """
    class_map = None if classes is None else read_class_map(classes)
    if not root.exists():
        raise UserError("the source is missing", got=root, expected=KINDS, hint="check the path")
    found = _find_in_folder(root, split, class_map) if root.is_dir() else _find_in_tar(root, split)
    if split is not None and (found.has_splits or val_fraction is not None):
        why = f"{root} has its own splits" if found.has_splits else "--val-fraction makes train and val"
        alone = next((part.root for part in found.parts if part.root != root), None)
        hint = "leave it out" if alone is None else f"leave it out, or name one of them: {alone}"
        raise UserError(f"--split has no effect: {why}", got=f"--split {split}", hint=hint)
    parts, has_splits = found.parts, found.has_splits
    names = class_map or found.classes or tuple(name for name, _ in group_classes(parts[0].paths))
    labels = [_number_classes(part, names, "train" if class_map is None else "the class map") for part in parts]
    if val_fraction is not None:
        if any(part.split == "val" for part in parts):
            hint = "leave it out, or name the train part alone"
            raise UserError("--val-fraction has no effect: there is a val already", got=parts[-1].root, hint=hint)
        parts, labels = _divide(parts[0], labels[0], val_fraction, seed)
        has_splits = True
    return [
        Source(part.root, part.split, names, part.paths, label, has_splits, part.where)
        for part, label in zip(parts, labels, strict=True)
    ]


@contextmanager
def spooled(source: Source, chosen: np.ndarray, folder: Path) -> Iterator[Source]:
    """Yield a source whose `chosen` samples can be read one by one: the source itself, or a copy of parquet rows.

    The bytes of parquet rows are copied, file after file, into one file in `folder`. It is removed at the end, and so
    are those of killed runs.

    Args:
        chosen: Sample numbers [n]; of parquet, only these have places.

    Raises:
        UserError: A file is corrupt, a row has no image, or the disk is full.
    """
    if not isinstance(source.where, Rows):
        yield source
        return
    with spool_rows(source.root, source.where, chosen, folder) as spans:
        yield replace(source, root=folder, where=spans)


def _find_in_tar(tar: Path, split: str | None) -> _Found:
    if not tar.name.lower().endswith(".tar"):
        hint = "unpack it first" if tar.name.lower().endswith(ARCHIVES) else "check the path"
        raise UserError("the source is no directory and no tar", got=f"{tar} (a file)", expected=KINDS, hint=hint)
    name = first_member(tar)
    if name.endswith(".tar"):
        return _Found([_Part(tar, split or "train", *scan_nested(tar))], False)
    if re.search(r"(^|/)ILSVRC2012_val_", name):
        paths, spans, classes = scan_validation(tar, tar.parent / KIT)
        return _Found([_Part(tar, split or "val", paths, spans)], False, classes)
    got, hint = f"{tar} with {name!r} in it", "name the folder of the class tars, or unpack it"
    raise UserError("a tar of neither class tars nor ILSVRC's validation images", got=got, expected=KINDS, hint=hint)


def _find_in_folder(root: Path, split: str | None, class_map: tuple[str, ...] | None) -> _Found:
    folders, files = list_folder(root)
    # A folder `train` that holds folders is a split; one that holds only files may be a class named train.
    splits = [name for name in ("train", "val") if name in folders and list_folder(root / name)[0]]
    if splits == ["val"] and class_map is None:
        raise UserError(
            "labels come from train's classes, and there is no train folder",
            got=root,
            expected=LAYOUT,
            hint=f"add it, name the classes with --classes, or shard {root / 'val'} alone with --split val",
        )
    if splits:
        # Archives may be beside train/ and val/: ImageNet's own are, after they were unpacked.
        refuse_loose(root, [name for name in files if not name.lower().endswith(ARCHIVES)])
        return _Found([_Part(root / name, name, list_tree(root / name)) for name in splits], True)
    # Class folders beside ILSVRC's tars may have been unpacked from one of them: these are refused below.
    if {TRAIN_TAR, VAL_TAR} & set(files) and not any(re.fullmatch(r"n\d{8}", name) for name in folders):
        return _find_ilsvrc(root, files)
    parquet = find_parquet(root)
    # A parquet file beside folders, and named after no split, is taken for metadata of the images in them.
    if parquet is not None and (parquet[0] != root or not folders or None not in parquet[1]):
        folder, by_split = parquet
        tables, classes = scan_parquet(folder, list(by_split.values()), class_map)
        has_splits = None not in by_split
        parts = [_Part(folder, name or split or "train", *table) for name, table in zip(by_split, tables, strict=True)]
        return _Found(parts, has_splits, classes)
    tars = [name for name in files if name.endswith(".tar")]
    if tars and not folders:
        refuse_loose(root, [name for name in files if name not in tars])
        return _Found([_Part(root, split or "train", *scan_class_tars(root, tars))], False)
    return _Found([_Part(root, split or "train", list_tree(root))], False)


def _find_ilsvrc(root: Path, files: list[str]) -> _Found:
    parts, classes = [], None
    if TRAIN_TAR in files:
        parts.append(_Part(root / TRAIN_TAR, "train", *scan_nested(root / TRAIN_TAR)))
    if VAL_TAR in files:
        paths, spans, classes = scan_validation(root / VAL_TAR, root / KIT)
        parts.append(_Part(root / VAL_TAR, "val", paths, spans))
    return _Found(parts, True, None if TRAIN_TAR in files else classes)


def _number_classes(part: _Part, classes: tuple[str, ...], owner: str) -> list[int]:
    """Return the labels of a part's samples.

    Raises:
        UserError: A class is not in `classes`, or two files have one key.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    labels: list[int] = []
    unknown: list[str] = []
    for name, paths in group_classes(part.paths):
        _refuse_collisions(part.root, paths)
        labels += [label_of.get(name, -1)] * len(paths)
        unknown += [name] if name not in label_of else []
    if unknown:
        raise UserError(
            f"{part.split} has {len(unknown)} classes that {owner} lacks",
            got=", ".join(f"{part.root}: {name}" for name in unknown[:3]),
            expected=f"the {len(classes)} classes of {owner}",
            hint=f"rename or remove them, or add them to {owner}",
        )
    return labels


def _refuse_collisions(root: Path, paths: list[str]) -> None:
    path_of: dict[str, str] = {}
    for path in paths:
        stem = os.path.splitext(path)[0]
        other = path_of.setdefault(stem, path)
        if other is not path:
            raise UserError(
                f"two files have one key, {encode_key(path)}",
                got=f"{root}: {other} and {path}",
                expected="names that differ in more than the extension",
                hint="rename or remove one",
            )


def _divide(part: _Part, label: list[int], val_fraction: float, seed: int) -> tuple[list[_Part], list[list[int]]]:
    in_val = choose_val(part.paths, val_fraction, seed)
    parts, labels = [], []
    for split, chosen in (("train", np.flatnonzero(~in_val)), ("val", np.flatnonzero(in_val))):
        where = part.where
        if where is not None:
            where = where._replace(**{name: getattr(where, name)[chosen] for name in where._fields[1:]})
        parts.append(_Part(part.root, split, [part.paths[i] for i in chosen], where))
        labels.append([label[i] for i in chosen])
    return parts, labels
