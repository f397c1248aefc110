"""Read images from the rows of Hugging Face's parquet files: columns `image` (bytes, path) and `label` (integer).

A row's bytes cannot be read alone: they are copied, file after file, into a spool file with random access. Paths in a
file name samples and are never used as paths on disk.
"""

import fcntl
import json
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_prep.sources.archives import Spans
from gcvit.errors import UserError

_PREFIX = re.compile(r"(train|val|valid|validation|test)[-._].*")  # train-00000-of-00294.parquet
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val"}  # test sets come without labels
_COLUMNS = "image: struct of bytes (binary) and path (string); label: integer"
_MAX_CLASSES = 1_000_000
_ROWS_AT_ONCE = 64


class Rows(NamedTuple):
    """The row of each sample: number `row[i]` in `files[file[i]]`; columns of shape [N]."""

    files: tuple[str, ...]
    file: np.ndarray
    row: np.ndarray


class _Table(NamedTuple):
    """The rows of a split in the order of its files; `names` are those of the classes if the files have them."""

    names: tuple[str, ...] | None
    labels: np.ndarray
    image_names: list[str | None]
    rows: Rows


def find_parquet(root: Path) -> tuple[Path, dict[str | None, list[str]]] | None:
    """Find the folder with parquet files, `root` or `root/data`, and their names by split; None if there are none.

    A file is of the split that its name begins with; `test` is left out. The split is None if no name begins with one.

    Raises:
        UserError: Only some names begin with a split, or all with `test`.
    """
    for folder in (root, root / "data"):
        names = sorted(path.name for path in folder.glob("*.parquet") if not path.name.startswith("."))
        splits: dict[str | None, list[str]] = {}
        for name in names:
            match = _PREFIX.fullmatch(name)
            if match is None or match[1] in _SPLITS:
                splits.setdefault(_SPLITS[match[1]] if match else None, []).append(name)
        if None in splits and len(splits) > 1:
            expected = "train-*.parquet and validation-*.parquet, or no splits in any name"
            got, hint = folder / splits[None][0], "rename or remove it"
            raise UserError("a parquet file of no known split", got=got, expected=expected, hint=hint)
        if names and not splits:
            raise UserError("a test set has no labels to train on", got=folder / names[0], expected="train, validation")
        if names:
            return folder, splits
    return None


def scan_parquet(
    folder: Path, splits: list[list[str]], class_map: tuple[str, ...] | None
) -> tuple[list[tuple[list[str], Rows]], tuple[str, ...]]:
    """List the samples of each split's files; images are not read.

    The name of label i comes from the files' ClassLabel. If they have none, it is line i of the user's class map. If
    there is no class map either, it is i with leading zeros.

    Returns:
        A pair for each split, and the names of the classes. The pair has the names CLASS/name of the samples, sorted
        by class and then by name, and their rows.

    Raises:
        UserError: A file cannot be read, lacks a column or has a row without a label; the files disagree on the
            classes; or pyarrow is not installed.
    """
    tables = [_read_table(folder, files) for files in splits]
    if empty := [files for files, table in zip(splits, tables, strict=True) if not len(table.labels)]:
        raise UserError("the parquet files of a split have no rows", got=folder / empty[0][0])
    if len({table.names for table in tables}) > 1:
        raise UserError("the splits' parquet files disagree on the names of the classes", got=folder)
    num_labels = 1 + max(int(table.labels.max(initial=-1)) for table in tables)
    digits = len(str(num_labels - 1))
    names = tables[0].names or class_map or tuple(f"{label:0{digits}d}" for label in range(num_labels))
    if num_labels > len(names):
        got = f"{folder} with label {num_labels - 1}"
        raise UserError("a label has no name", got=got, expected=f"the {len(names)} classes that have one")
    return [_name_samples(table, names) for table in tables], names


@contextmanager
def spool_rows(root: Path, rows: Rows, chosen: np.ndarray, folder: Path) -> Iterator[Spans]:
    """Copy the images of the rows `chosen` (sample numbers) into one file in `folder`, and yield their spans.

    Spans of other samples are negative. The file is removed at the end. Files that killed runs on this host left are
    removed at the start: a running one holds a lock on its file.

    Raises:
        UserError: A row has no bytes, a file is corrupt, or the disk is full.
    """
    _remove_orphans(folder)
    with ExitStack() as stack:
        try:
            path, file = _create_spool(folder)
            stack.enter_context(file)
            stack.callback(path.unlink)
            spans = _copy_rows(root, rows, chosen, file, path.name)
        except OSError as error:  # of writing: errors of reading are UserErrors already
            hint = "free as much space as the images of this part need"
            got = f"{folder} ({error.strerror})"
            raise UserError("cannot write the images of parquet files", got=got, hint=hint) from None
        yield spans


def _read_table(folder: Path, files: list[str]) -> _Table:
    names: dict[tuple[str, ...] | None, str] = {}
    labels: list[np.ndarray] = []
    image_names: list[str | None] = []
    for file in files:
        schema = _open(folder / file).schema_arrow
        has_path = _check_schema(folder / file, schema)
        names.setdefault(_class_names(schema), file)
        first = len(image_names)
        parts = [np.zeros(0, np.int64)]
        for batch in _read(folder / file, ["label", "image.path"] if has_path else ["label"], 1 << 16):
            label = batch.column("label")
            image_names += batch.column("image").field("path").to_pylist() if has_path else [None] * len(label)
            parts.append(label.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64))
        label = np.concatenate(parts)
        if len(wrong := np.flatnonzero((label < 0) | (label >= _MAX_CLASSES))):
            got = f"{folder / file}: row {wrong[0]} with {label[wrong[0]]}"
            raise UserError(
                "a row has no label", got=got, expected=f"0 to {_MAX_CLASSES - 1:,}", hint="remove such rows"
            )
        assert len(image_names) == first + len(label)
        labels.append(label)
    if len(names) > 1:
        got = " and ".join(str(folder / file) for file in list(names.values())[:2])
        raise UserError("parquet files disagree on the names of the classes", got=got)
    counts = [len(label) for label in labels]
    file_of_row = np.repeat(np.arange(len(files), dtype=np.int32), counts)
    row = np.concatenate([np.arange(count) for count in counts])
    return _Table(next(iter(names)), np.concatenate(labels), image_names, Rows(tuple(files), file_of_row, row))


def _check_schema(path: Path, schema: Any) -> bool:
    """Return whether images have a path.

    Raises:
        UserError: A column is missing or of another type.
    """
    from pyarrow import types

    image, label = ((schema.field(name).type if name in schema.names else None) for name in ("image", "label"))
    if image is not None and types.is_struct(image) and label is not None and types.is_integer(label):
        fields = {field.name: field.type for field in image}
        data, name = fields.get("bytes"), fields.get("path")
        if data is not None and (types.is_binary(data) or types.is_large_binary(data)):
            return name is not None and (types.is_string(name) or types.is_large_string(name))
    got = ", ".join(f"{field.name}: {field.type}" for field in schema)
    raise UserError("a parquet file has other columns", got=f"{path} with {got}", expected=_COLUMNS)


def _class_names(schema: Any) -> tuple[str, ...] | None:
    """Return the names that the datasets library wrote into the metadata, or None; _ replaces a slash or first dot."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
        names = tuple(re.sub(r"/|^\.", "_", str(name)) for name in names)
    except (ValueError, LookupError, TypeError):
        return None
    if "" in names or len(set(names)) < len(names):
        raise UserError("the parquet files' classes have no names of their own", got=names, expected="all different")
    return names or None


def _name_samples(table: _Table, names: tuple[str, ...]) -> tuple[list[str], Rows]:
    """Name the samples of a class after their images if these names are unique in it, else by number."""
    files, file, row = table.rows
    digits = len(str(len(row)))
    by_label = np.argsort(table.labels, kind="stable")
    bounds = np.searchsorted(table.labels[by_label], np.arange(len(names) + 1))
    paths: list[str] = []
    order = [np.zeros(0, np.int64)]
    for name, label in sorted((name, label) for label, name in enumerate(names)):
        samples = by_label[bounds[label] : bounds[label + 1]]
        found = [re.split(r"[/\\]", table.image_names[i] or "")[-1] for i in samples]
        stems = {os.path.splitext(image)[0] for image in found}
        if len(stems) < len(found) or any(image.startswith(".") or not image for image in found):
            found = [f"{i:0{digits}d}" for i in samples]
        ranks = sorted(range(len(found)), key=found.__getitem__)
        paths += [f"{name}/{found[i]}" for i in ranks]
        order.append(samples[ranks])
    chosen = np.concatenate(order)
    return paths, Rows(files, file[chosen], row[chosen])


def _copy_rows(root: Path, rows: Rows, chosen: np.ndarray, out: BinaryIO, name: str) -> Spans:
    offset, length = np.full((2, len(rows.row)), -1, np.int64)
    chosen = chosen[np.lexsort((rows.row[chosen], rows.file[chosen]))]
    bounds = np.searchsorted(rows.file[chosen], np.arange(len(rows.files) + 1))
    for number, file in enumerate(rows.files):
        wanted = chosen[bounds[number] : bounds[number + 1]]
        groups = _groups(root / file, rows.row[wanted]) if len(wanted) else []
        for group, first, begin, end in groups:
            position = begin
            for batch in _read(root / file, ["image.bytes"], _ROWS_AT_ONCE, group):
                images = batch.column("image").field("bytes")
                while position < end and rows.row[wanted[position]] < first + len(images):
                    sample = wanted[position]
                    data = images[int(rows.row[sample]) - first].as_buffer()
                    if data is None:
                        got = f"{root / file}: row {rows.row[sample]}"
                        raise UserError(
                            "a row holds no image", got=got, hint="write the bytes into the file, not a path"
                        )
                    offset[sample], length[sample] = out.tell(), data.size
                    out.write(data)
                    position += 1
                first += len(images)
    out.flush()
    return Spans((name,), np.zeros(len(rows.row), np.int32), offset, length)


def _groups(path: Path, wanted: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Yield the row groups of a file that hold any of the rows `wanted`: number, first row, and range in `wanted`."""
    metadata = _open(path).metadata
    first = 0
    for group in range(metadata.num_row_groups):
        last = first + metadata.row_group(group).num_rows
        begin, end = np.searchsorted(wanted, (first, last))
        if begin < end:
            yield group, first, int(begin), int(end)
        first = last


def _spool_name() -> tuple[str, str]:
    """Return begin and end of the name of a spool file, with the host's name, since locks may not reach other hosts."""
    host = re.sub(r"[^a-z0-9.]", "_", socket.gethostname().lower())
    return f".spool-{host}-", ".tmp"


def _create_spool(folder: Path) -> tuple[Path, BinaryIO]:
    prefix, suffix = _spool_name()
    while True:
        descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=folder)
        with suppress(OSError):  # a file system without locks; then a killed run's file stays
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.exists(name):  # else another process removed it as an orphan before it was locked
            return Path(name), os.fdopen(descriptor, "wb", buffering=1 << 20)
        os.close(descriptor)


def _remove_orphans(folder: Path) -> None:
    for path in folder.glob("*".join(_spool_name())):
        with suppress(OSError), open(path, "r+b") as file:  # its writer is running, or has removed it
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _open(path: Path) -> Any:
    """Open a ParquetFile, which reads its file's footer.

    Raises:
        UserError: The file is corrupt, or pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet files need pyarrow, which is missing", hint="pip install pyarrow") from None
    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError("cannot read a parquet file", got=f"{path} ({error})", hint="fetch it again") from None


def _read(path: Path, columns: list[str], num_rows: int, group: int | None = None) -> Iterator[Any]:
    """Yield batches of at most `num_rows` rows of a file, or of one of its row groups."""
    import pyarrow

    try:
        yield from _open(path).iter_batches(num_rows, None if group is None else [group], columns)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError("cannot read a parquet file", got=f"{path} ({error})", hint="fetch it again") from None
