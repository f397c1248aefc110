"""What data_prep wrote about a split: shards, classes, and where each sample lies. Owns the schema.

A split's folder holds tars `SPLIT-000000.tar`, a small `manifest.json`, and one `.npy` column per field of a
sample. Samples are numbered through the shards in the order of `manifest.json`, and lie in each shard in that
order. The columns are memory-mapped, so that opening 14 million samples costs no memory of its own.

Tars that others made may lie beside a manifest too (`data_prep.index`): their checksums, for which all bytes must
be read, are optional. A manifest has the SHA-256 of all shards and the crc32 of all samples, or neither.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from gcvit.errors import UserError

VERSION: Literal[1] = 1
FILE_NAME = "manifest.json"
COLUMNS: dict[str, np.dtype[Any]] = {
    "offset": np.dtype("<i8"),
    "length": np.dtype("<u4"),
    "label": np.dtype("<i4"),
    "crc32": np.dtype("<u4"),  # absent where a manifest has no checksums
}
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
HEADER_BYTES = 512  # a tar member's header directly before its payload
SHARD_AGAIN = "python -m data_prep.shard SOURCE OUT writes shards and their manifest"
INDEX = "python -m data_prep.index DIR writes a manifest for tars that are there"


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, how many samples it holds, its size in bytes, its SHA-256 in hex if it is known."""

    name: str
    num_samples: NonNegativeInt
    num_bytes: NonNegativeInt
    sha256: str | None


@dataclass(frozen=True, eq=False)
class Manifest:
    """A split: `root` is its folder; a label is an index into `classes`; every column has shape [N].

    `offset` (int64) is the byte at which a sample's image begins in its tar, `length` (uint32) the image's
    size in bytes, `label` (int32) its class, `crc32` (uint32) the checksum of the image's bytes, None where it is
    unknown. Columns that were read are memory-mapped and read-only; pickling copies them, so hand the folder to
    other processes.
    """

    root: Path
    split: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    offset: np.ndarray
    length: np.ndarray
    label: np.ndarray
    crc32: np.ndarray | None = None

    @property
    def num_samples(self) -> int:
        return len(self.label)

    @cached_property
    def first(self) -> np.ndarray:
        """Number of the first sample of each shard, then N: int64 [num_shards + 1]."""
        return np.concatenate([[0], np.cumsum([shard.num_samples for shard in self.shards])]).astype(np.int64)

    @cached_property
    def digest(self) -> str:
        """Compute the SHA-256 of split, classes, shards (by their hashes) and columns, in hex."""
        return _digest(_describe(self.split, self.classes, self.shards, self.columns))

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Return the columns that exist, by their names in `COLUMNS`."""
        columns = {name: getattr(self, name) for name in COLUMNS}
        return {name: column for name, column in columns.items() if column is not None}

    def member_name(self, index: int) -> str:
        """Read the shard and member of sample `index`: "train-000123.tar: n01440764/n01440764_10026.jpg".

        This is for messages about corruption, so that it never raises: a number replaces a name that is lost.
        """
        shard = self.shards[int(np.searchsorted(self.first, index, side="right")) - 1]
        try:
            with open(self.root / shard.name, "rb") as file:
                file.seek(int(self.offset[index]) - HEADER_BYTES)
                header = tarfile.TarInfo.frombuf(file.read(HEADER_BYTES), "utf-8", "backslashreplace")
            return f"{shard.name}: {header.name}"
        except (OSError, ValueError, tarfile.HeaderError):
            return f"{shard.name}: sample {index}"


class _File(BaseModel):
    """`manifest.json` as it stands on disk; `columns` maps a column's name to the SHA-256 of its values."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: Literal[1]
    split: str
    classes: list[str]
    num_samples: NonNegativeInt
    shards: list[Shard]
    columns: dict[Literal["offset", "length", "label", "crc32"], str]
    digest: str


def column_path(folder: Path, name: str) -> Path:
    return folder / f"manifest.{name}.npy"


def find_split(data_dir: Path, split: str) -> Path | None:
    """Find the folder with the shards of `split`: `data_dir/split`, `data_dir` itself, or None.

    A folder of tars without a manifest is found too, so that `read_manifest` can report it.
    """
    if (data_dir / split).is_dir():  # then archives in data_dir are its source
        return data_dir / split if holds_shards(data_dir / split) else None
    try:
        if json.loads((data_dir / FILE_NAME).read_bytes())["split"] == split:
            return data_dir
        return None
    except (FileNotFoundError, NotADirectoryError):
        names = _shard_names(data_dir)
        known = [name for name in names if name.startswith(("train-", "val-"))]
        is_ours = any(name.startswith(f"{split}-") for name in known) if known else bool(names)
        return data_dir if is_ours else None
    except (OSError, ValueError, LookupError, TypeError):
        return data_dir


def holds_shards(folder: Path) -> bool:
    """Tell whether `folder` itself contains a manifest or a tar, compressed or not."""
    return (folder / FILE_NAME).exists() or bool(_shard_names(folder))


def read_manifest(folder: Path, check_shards: bool = True) -> Manifest:
    """Open the split in `folder`, and check its schema and the hashes of its columns.

    Args:
        check_shards: check the sizes of the shards too. Their bytes are not read: `data_prep.verify` does that.

    Raises:
        UserError: a missing or malformed manifest, corrupt columns, a missing, truncated or compressed shard.
    """
    file = _read_file(folder)
    shards = tuple(file.shards)
    columns: dict[str, np.ndarray] = {
        name: _open_column(folder, name, file.num_samples) for name in COLUMNS if name in file.columns
    }
    manifest = Manifest(folder, file.split, tuple(file.classes), shards, **columns)
    # A shard's number of samples, a class or a checksum edited by hand is found here, as is a flipped bit.
    found = _describe(manifest.split, manifest.classes, shards, columns)
    for name, value in found["columns"].items():
        if file.columns.get(name) != value:
            raise UserError(
                f"a column of the manifest is corrupt: {column_path(folder, name)}",
                got=f"SHA-256 {value}",
                expected=file.columns.get(name),
                hint=SHARD_AGAIN,
            )
    if file.digest != _digest(found):
        what = "the manifest was changed after it was written"
        raise UserError(what, got=folder / FILE_NAME, hint=SHARD_AGAIN)
    # The value of the property is known now, which saves a second pass over the columns.
    manifest.__dict__["digest"] = file.digest
    if check_shards:
        _check_shards(folder, shards)
    return manifest


def write_manifest(
    folder: Path,
    split: str,
    classes: Sequence[str],
    shards: Sequence[Shard],
    columns: Mapping[str, np.ndarray],
) -> None:
    """Write the columns (each [N], named as in `COLUMNS`), then `manifest.json`, each whole or not at all.

    The manifest comes last: a folder that has one is complete.
    """
    columns = {name: np.ascontiguousarray(columns[name], dtype=COLUMNS[name]) for name in COLUMNS if name in columns}
    num_samples = sum(shard.num_samples for shard in shards)
    assert all(column.shape == (num_samples,) for column in columns.values()), "a column's length is not N"
    for name, column in columns.items():
        with open(temporary := folder / f"manifest.{name}.npy.tmp", "wb") as file:
            np.save(file, column, allow_pickle=False)
            _sync(file)
        os.replace(temporary, column_path(folder, name))
    content = _describe(split, classes, shards, columns)
    with open(temporary := folder / f"{FILE_NAME}.tmp", "wb") as file:
        file.write(json.dumps(content | {"digest": _digest(content)}, indent=1).encode() + b"\n")
        _sync(file)
    os.replace(temporary, folder / FILE_NAME)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush the folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _describe(
    split: str, classes: Sequence[str], shards: Sequence[Shard], columns: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Build the content of `manifest.json`, without its digest."""
    return {
        "version": VERSION,
        "split": split,
        "classes": list(classes),
        "num_samples": len(columns["label"]),
        "shards": [asdict(shard) for shard in shards],
        "columns": {
            name: hashlib.sha256(np.ascontiguousarray(columns[name], dtype=COLUMNS[name]).data).hexdigest()
            for name in COLUMNS
            if name in columns
        },
    }


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _shard_names(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.endswith((".tar", *COMPRESSED)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read_file(folder: Path) -> _File:
    path = folder / FILE_NAME
    try:
        file = _File.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise _explain_absence(folder) from None
    except OSError as error:
        raise UserError("cannot read the manifest", got=f"{path} ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"the manifest is malformed: {path}",
            got=f"{where}: {first['msg']}" if where else first["msg"],
            expected=f"schema version {VERSION}",
            hint=SHARD_AGAIN,
        ) from None
    in_shards = sum(shard.num_samples for shard in file.shards)
    if not file.num_samples == in_shards > 0:
        raise UserError(
            f"the manifest's counts disagree: {path}",
            got=f"{file.num_samples} samples, {in_shards} in its shards",
            expected="equal and above 0",
            hint=SHARD_AGAIN,
        )
    if missing := {"offset", "length", "label"} - file.columns.keys():
        raise UserError(f"the manifest lacks columns: {path}", got=", ".join(sorted(missing)), hint=SHARD_AGAIN)
    return file


def _explain_absence(folder: Path) -> UserError:
    names = _shard_names(folder)
    compressed = next((name for name in names if name.endswith(COMPRESSED)), None)
    if compressed:
        return _refuse_compressed(folder / compressed)
    if names:
        return UserError(
            f"shards without a manifest: {folder}",
            got=f"{len(names)} tars and no {FILE_NAME}",
            hint="start the command that was writing them again; for tars made by others: " + INDEX,
        )
    expected = f"a folder of tars with {FILE_NAME}"
    return UserError("no shards here", got=folder, expected=expected, hint=SHARD_AGAIN)


def _refuse_compressed(path: Path) -> UserError:
    return UserError(
        "a compressed shard cannot be read at an offset",
        got=path,
        expected=".tar",
        hint=f"images do not compress further: shard them again; {SHARD_AGAIN}",
    )


def _open_column(folder: Path, name: str, num_samples: int) -> np.ndarray:
    path = column_path(folder, name)
    try:
        column: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError("a column of the manifest is missing", got=path, hint=SHARD_AGAIN) from None
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        what = "a column of the manifest is corrupt"
        raise UserError(what, got=f"{path} ({error})", hint=SHARD_AGAIN) from None
    dtype, shape = getattr(column, "dtype", None), getattr(column, "shape", None)  # a zip file has neither
    if (dtype, shape) != (COLUMNS[name], (num_samples,)):
        raise UserError(
            f"a column of the manifest is corrupt: {path}",
            got=f"{dtype} {shape}",
            expected=f"{COLUMNS[name]} ({num_samples},)",
            hint=SHARD_AGAIN,
        )
    return column


def _check_shards(folder: Path, shards: Sequence[Shard]) -> None:
    wrong = []
    for shard in shards:
        if shard.name.endswith(COMPRESSED):
            raise _refuse_compressed(folder / shard.name)
        if shard.name != os.path.basename(shard.name):
            raise UserError("a shard lies outside the manifest's folder", got=shard.name, expected=folder)
        try:
            size = os.stat(folder / shard.name).st_size
        except OSError as error:
            wrong.append(f"{folder / shard.name}: {error.strerror}")
            continue
        if size != shard.num_bytes:
            kind = "truncated" if size < shard.num_bytes else "grown"
            wrong.append(f"{folder / shard.name} is {kind}: {size} bytes instead of {shard.num_bytes}")
    if wrong:
        more = f" (and {len(wrong) - 1} more shards)" if len(wrong) > 1 else ""
        raise UserError(
            "the manifest and its shards disagree",
            got=wrong[0] + more,
            expected="the shards that it was written for",
            hint=f"copy the shard again, or delete the folder and shard again; {SHARD_AGAIN}",
        )
