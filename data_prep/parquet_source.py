"""Images in the rows of Hugging Face's parquet files: the column `image` (bytes, path) and the integer `label`.

A row's bytes cannot be read singly, so that they are copied, file after file, into a spool file that can. What a
file says of paths names samples and is never used as a path on disk.
"""

import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_prep.archives import Spans
from gcvit.errors import UserError

_PREFIX = re.compile(r"(train|val|valid|validation|test)(?=[-._]).*")  # train-00000-of-00294.parquet
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val"}  # test sets come without labels
_MAX_CLASSES = 1_000_000
_ROWS_AT_ONCE = 64


class Rows(NamedTuple):
    """The row of each sample: number `row[i]` in `files[file[i]]`; columns of shape [N]."""

    files: tuple[str, ...]
    file: np.ndarray
    row: np.ndarray


class Table(NamedTuple):
    """A split's rows in the order of the files; `names` are the classes' where the files tell them."""

    names: tuple[str, ...] | None
    labels: np.ndarray
    image_names: list[str]
    rows: Rows


def find_parquet(root: Path) -> tuple[Path, dict[str | None, list[str]]] | None:
    """The folder, `root` or `root/data`, that holds parquet files, and these by split; None where neither does.

    Files are of the split that their name begins with; `test` is left out. The split is None where no file's name
    begins with one. Errors: UserError where only some do.
    """
    for folder in (root, root / "data"):
        names = sorted(path.name for path in folder.glob("*.parquet") if not path.name.startswith("."))
        if not names:
            continue
        splits: dict[str | None, list[str]] = {}
        for name in names:
            match = _PREFIX.fullmatch(name)
            if match is None or match[1] in _SPLITS:
                splits.setdefault(_SPLITS[match[1]] if match else None, []).append(name)
        if None in splits and len(splits) > 1:
            got, allowed = folder / splits[None][0], "train-*.parquet and validation-*.parquet, or names without splits"
            raise UserError("a parquet file of an unknown split", got=got, allowed=allowed, cure="rename or remove it")
        if not splits:
            raise UserError("the parquet files hold a test split alone", got=folder, allowed="train or validation")
        return folder, splits
    return None


def read_table(folder: Path, files: Sequence[str]) -> Table:
    """Labels and names of the rows of `files`; images are not read.

    Errors: UserError for files that cannot be read, lack a column, disagree on the classes, or have a row without a
    label; and without pyarrow.
    """
    names: dict[tuple[str, ...] | None, str] = {}
    labels: list[np.ndarray] = []
    image_names: list[str] = []
    for file in files:
        schema = _open(folder / file).schema_arrow
        names.setdefault(_class_names(schema), file)
        has_path = _check_schema(folder / file, schema)
        for batch in _read(folder / file, ["label", "image.path"] if has_path else ["label"]):
            label = batch.column("label")
            if label.null_count:
                raise UserError("a row has no label", got=folder / file, cure="remove such rows, or the file")
            labels.append(label.to_numpy(zero_copy_only=False).astype(np.int64))
            image_names += _texts(batch.column("image")) if has_path else [""] * len(label)
        labels.append(np.zeros(0, np.int64))  # an empty file has no batches
    if len(names) > 1:
        got = " and ".join(str(folder / file) for file in list(names.values())[:2])
        raise UserError("parquet files disagree on the names of the classes", got=got)
    return ...


def _x() -> None: ...
