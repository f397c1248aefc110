"""Make sharding restartable: a sidecar beside each complete shard, and a mark in the folder until all are complete.

`.sharding.json`, the mark, describes the planned content of the folder. `train-000123.tar.json`, a sidecar, exists if
its shard is complete, and holds the shard's part of the manifest. Both are written whole or not at all, under unique
temporary names, so that many processes on many nodes may write into one folder and be killed at any moment. `merge`
makes the manifest of the sidecars.
"""

import json
import os
import secrets
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gcvit.data.manifest import COLUMNS, FILE_NAME, Manifest, Shard, read_manifest, sync_folder, write_manifest
from gcvit.errors import UserError
from gcvit.runtime.atomic_write import write_text

MARK = ".sharding.json"
MERGING = ".merging"  # the head of the names of the folders in which manifests are made
AGAIN = "start the command that was writing them again (with --part: all its parts); what is complete is kept"


@dataclass(frozen=True)
class Mark:
    """The planned content of a folder: `plan` is the digest of sources and options, in hex."""

    plan: str
    split: str
    classes: tuple[str, ...]
    num_shards: int

    def shard_name(self, number: int) -> str:
        """Return the file name of a shard."""
        return f"{self.split}-{number:06d}.tar"


@dataclass(frozen=True)
class Sidecar:
    """A complete shard with its part of the columns, each [num_samples of the shard].

    `num_source_bytes` is the size of its images before any of them was re-encoded.
    """

    shard: Shard
    columns: dict[str, np.ndarray]
    num_source_bytes: int


def sidecar_path(tar_path: Path) -> Path:
    """Return the path of a shard's sidecar."""
    return tar_path.with_name(f"{tar_path.name}.json")


def has_sidecars(folder: Path) -> bool:
    """Return whether sharding in `folder` is unfinished: the mark is written first and removed last."""
    return (folder / MARK).exists()


def write_mark(folder: Path, mark: Mark) -> None:
    """Write the folder's mark."""
    write_text(folder / MARK, json.dumps(asdict(mark)), durable=False)  # an empty one is refused and written anew


def read_mark(folder: Path) -> Mark | None:
    """Read the folder's mark; None if there is none that can be read."""
    try:
        found = json.loads((folder / MARK).read_bytes())
        return Mark(str(found["plan"]), str(found["split"]), tuple(found["classes"]), int(found["num_shards"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def write_sidecar(tar_path: Path, plan: str, sidecar: Sidecar) -> None:
    """Mark the shard at `tar_path` as complete: it must be on disk under that name already."""
    content = {
        "plan": plan,
        "shard": asdict(sidecar.shard),
        "columns": {name: column.tolist() for name, column in sidecar.columns.items()},
        "num_source_bytes": sidecar.num_source_bytes,
    }
    write_text(sidecar_path(tar_path), json.dumps(content), durable=False)  # an empty one means: write the shard again


def read_sidecar(tar_path: Path, plan: str) -> Sidecar | None:
    """Read the sidecar of a shard; None if the shard is not complete, or belongs to another plan."""
    try:
        found = json.loads(sidecar_path(tar_path).read_bytes())
        shard = Shard(**found["shard"])
        columns = {name: np.array(found["columns"][name], dtype) for name, dtype in COLUMNS.items()}
        sidecar = Sidecar(shard, columns, int(found["num_source_bytes"]))
        is_whole = (
            found["plan"] == plan
            and shard.name == tar_path.name
            and all(column.shape == (shard.num_samples,) for column in columns.values())
            and tar_path.stat().st_size == shard.num_bytes
        )
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        return None
    return sidecar if is_whole else None


def merge(folder: Path) -> Manifest:
    """Make the manifest of a folder's sidecars, and remove these and the mark.

    A second call, or one in another process at the same time, gives the same bytes.

    Raises:
        UserError: Shards are missing, or the manifest cannot be written.
    """
    try:
        if not (folder / FILE_NAME).exists():
            _write_manifest(folder)
    except (OSError, UserError) as error:
        # Another process may have been faster and removed the sidecars: its manifest was there before that.
        if not (folder / FILE_NAME).exists():
            if isinstance(error, OSError):
                raise UserError("cannot write the manifest", got=f"{folder} ({error.strerror})", hint=AGAIN) from None
            raise
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        sidecar_path(folder / shard.name).unlink(missing_ok=True)
    for path in folder.glob(f"{MERGING}-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)
    (folder / MARK).unlink(missing_ok=True)
    return manifest


def _write_manifest(folder: Path) -> None:
    mark = read_mark(folder)
    if mark is None:
        raise UserError("no interrupted sharding here", got=folder, expected=f"a folder with {MARK}", hint=AGAIN)
    names = [mark.shard_name(number) for number in range(mark.num_shards)]
    sidecars = [read_sidecar(folder / name, mark.plan) for name in names]
    if missing := [name for name, sidecar in zip(names, sidecars, strict=True) if sidecar is None]:
        more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
        raise UserError(
            f"{len(missing):,} of {mark.num_shards:,} shards are not complete: {folder}",
            got=", ".join(missing[:5]) + more,
            hint=AGAIN,
        )
    whole = [sidecar for sidecar in sidecars if sidecar is not None]
    columns = {name: np.concatenate([sidecar.columns[name] for sidecar in whole]) for name in COLUMNS}
    # In a folder of its own, so that two processes never write to one file; then file by file, the manifest last.
    workshop = folder / f"{MERGING}-{secrets.token_hex(4)}"
    workshop.mkdir()
    try:
        write_manifest(workshop, mark.split, mark.classes, [sidecar.shard for sidecar in whole], columns)
        for path in sorted(workshop.iterdir(), key=lambda path: path.name == FILE_NAME):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    sync_folder(folder)
