"""The predictions of each sample: gathered from all ranks in the source's order, and written as a table."""

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gcvit.data.source import Source
from gcvit.errors import UserError
from gcvit.evaluation.evaluator import Scored
from gcvit.runtime.distributed import World

TOP = 5
COLUMNS = ("set", "weights", "index", "key", "label", *(f"top{k + 1}" for k in range(TOP)), "confidence")
SUFFIXES = (".csv", ".parquet")
_ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Predictions:
    """One row for each counted sample of a source, in its order; all arrays are [N]."""

    indices: npt.NDArray[np.int64]
    """The sample's number in its source."""
    labels: npt.NDArray[np.int32]
    """The class of the sample's folder."""
    ranks: npt.NDArray[np.int32]
    """The number of classes ranked before a right one; 0 is correct."""
    top: npt.NDArray[np.int32]
    """The likeliest classes, [N, 5] or fewer where there are fewer; of equal ones the lower index first."""
    confidences: npt.NDArray[np.float32]
    """Probability of the first of them."""

    def __len__(self) -> int:
        return len(self.indices)


class Collector:
    """Collect the results of a rank's batches (`watch` of `evaluate`), and gather those of all ranks."""

    def __init__(self) -> None:
        self._batches: list[tuple[torch.Tensor, ...]] = []

    def __call__(self, scored: Scored) -> None:
        # A stable sort, where topk takes any of equal logits; NaN comes first, as in the ranks.
        order = scored.logits.sort(dim=1, descending=True, stable=True)
        confidences = order.values[:, 0] - scored.logits.logsumexp(1)
        rows = (scored.indices, scored.labels, scored.ranks, order.indices[:, :TOP], confidences.exp())
        # Padding is left out in the end: now the device would have to be waited for. What a loader process made is
        # copied, since its memory takes a file descriptor for as long as it is kept.
        self._batches.append((scored.valid, *(row.clone() for row in rows)))

    def gather(self, world: World) -> Predictions:
        """Gather the rows of all ranks, on every rank."""
        types = (np.int64, np.int32, np.int32, np.int32, np.float32)
        columns = [torch.cat(rows).cpu() for rows in zip(*self._batches, strict=True)]
        valid = columns.pop(0)
        own = [column[valid].numpy().astype(kind) for column, kind in zip(columns, types, strict=True)]
        of_ranks = world.gather(own)
        # Ranks take consecutive samples, so that theirs behind each other are in order.
        found = Predictions(*(np.concatenate(rows) for rows in zip(*of_ranks, strict=True)))
        assert (np.diff(found.indices) > 0).all(), "a sample came twice, or out of order"
        return found


def key_of(source: Source, index: int) -> str:
    """Return a sample's name in its split, without the name of its shard: "n01440764/n01440764_10026.jpg"."""
    name = source.name(index)
    key = name.partition(": ")[2] if source.is_chunked else name
    return os.fsencode(key).decode(errors="backslashreplace")  # of a disk, where names may be any bytes


def rows_of(
    name: str, weights: str, found: Predictions, source: Source, classes: Sequence[str]
) -> Iterator[dict[str, list[Any]]]:
    """Yield predictions as columns, some thousand rows at a time; `name` and `weights` name the evaluation."""
    names = np.array(classes, dtype=object)
    for begin in range(0, len(found), _ROWS_AT_ONCE):
        rows = slice(begin, begin + _ROWS_AT_ONCE)
        indices, top = found.indices[rows].tolist(), found.top[rows]
        likeliest = [names[top[:, k]].tolist() if k < top.shape[1] else [None] * len(indices) for k in range(TOP)]
        columns = (
            [name] * len(indices),
            [weights] * len(indices),
            indices,
            [key_of(source, index) for index in indices],
            names[found.labels[rows]].tolist(),
            *likeliest,
            found.confidences[rows].tolist(),
        )
        yield dict(zip(COLUMNS, columns, strict=True))


def check_path(path: Path) -> None:
    """Check that `open_writer` can write the file.

    Raises:
        UserError: It cannot.
    """
    if path.suffix not in SUFFIXES:
        raise UserError("--predictions writes tables", got=path, expected=" or ".join(f"*{end}" for end in SUFFIXES))
    if not path.absolute().parent.is_dir():
        raise UserError("--predictions: no such folder", got=path.absolute().parent, hint="make it")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise UserError("a parquet file needs pyarrow", got=path, hint="pip install pyarrow, or write a .csv")


@contextmanager
def open_writer(path: Path) -> Iterator[Callable[[dict[str, list[Any]]], None]]:
    """Open a CSV or parquet file, and yield a function that appends `rows_of`; the file gets its name when complete.

    Raises:
        UserError: The file cannot be written.
    """
    part = path.with_name(f"{path.name}.tmp")
    with _naming(path):
        file, append = (_open_csv if path.suffix == ".csv" else _open_parquet)(part)

    def append_row_group(columns: dict[str, list[Any]]) -> None:
        with _naming(path):
            append(columns)

    try:
        yield append_row_group
    except BaseException:
        with suppress(OSError):  # the first error matters more
            file.close()
            part.unlink()
        raise
    with _naming(path):
        file.close()
        part.replace(path)


def _open_csv(path: Path) -> tuple[Any, Callable[[dict[str, list[Any]]], object]]:
    file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115  (open_writer closes it)
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    return file, lambda columns: writer.writerows(zip(*columns.values(), strict=True))


def _open_parquet(path: Path) -> tuple[Any, Callable[[dict[str, list[Any]]], object]]:
    import pyarrow
    import pyarrow.parquet

    types = {"index": pyarrow.int64(), "confidence": pyarrow.float32()}
    schema = pyarrow.schema([(name, types.get(name, pyarrow.string())) for name in COLUMNS])
    writer = pyarrow.parquet.ParquetWriter(path, schema)
    return writer, lambda columns: writer.write_table(pyarrow.table(columns, schema))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn errors of the file into UserError; other errors pass through `open_writer` unchanged."""
    try:
        yield
    except OSError as error:
        raise UserError("cannot write the predictions", got=f"{path} ({error.strerror})") from None
