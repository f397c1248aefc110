"""Rewrite shards without their corrupt samples, or with these from the source: `verify --repair [--source DIR]`.

1. The new shards, then the new manifest, are written to `.repair.tmp` in the split's folder.
2. That folder is renamed to `.repair`: from now on the repair is final.
3. Its shards are moved to their places, then its columns, and last its manifest.

A repair that is killed before 2 changes nothing. One that is killed later may leave shards that do not match the
manifest; `finish_repair` completes it, and may be killed and repeated itself.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_prep.recover import Corruption, Restored, find_restored
from data_prep.shards.byte_range import read_place
from data_prep.shards.direct_io import DirectFile
from data_prep.shards.samples import IMAGES, Contents, split_name
from data_prep.shards.tar_reader import Piece, TarReader
from data_prep.shards.tar_writer import TarWriter, encode_key, sample_members
from data_prep.sources.discover import Source
from data_prep.workers import Progress, run_tasks
from gcvit.data.manifest import FILE_NAME, Manifest, Shard, read_manifest, sync_folder, write_manifest
from gcvit.errors import UserError

READY = ".repair"
UNREADY = ".repair.tmp"


@dataclass(frozen=True)
class Task:
    """A shard to rewrite into `folder`: its samples by their numbers in the shard.

    `kept` are the places of images in the old tar. `restored` samples come from `root`, from the first place whose key
    is free. All others are left out: `corrupt_keys` are their keys where these are known, `lost_sizes` the sizes in
    bytes of images that cannot be found.
    """

    path: Path
    folder: Path
    num_samples: int
    kept: dict[int, int]
    root: Path
    restored: dict[int, list[Restored]]
    corrupt_keys: frozenset[str]
    lost_sizes: frozenset[int]


@dataclass(frozen=True)
class Result:
    """A rewritten shard; `rows` are the numbers of its samples in the old one, `offset` the new places: [n].

    A shard without samples is not written. `removed` names members under other keys that may have belonged to lost
    samples.
    """

    shard: Shard
    rows: np.ndarray
    offset: np.ndarray
    num_restored: int
    removed: list[str]


def is_interrupted(folder: Path) -> bool:
    """Return whether a repair of `folder` was interrupted after it became final."""
    return (folder / READY).exists()


def repair(manifest: Manifest, corruption: Corruption, source: Source | None, num_workers: int) -> None:
    """Rewrite the shards in `corruption` and the manifest, and print the changes.

    Members that belong to no sample of the manifest are kept behind the samples; folders and links in a tar are not.

    Raises:
        UserError: No sample would be left, the source lacks some of the corrupt ones, a shard is a link to another
            disk, or the disk is full. Nothing was changed.
    """
    folder, workshop = manifest.root, manifest.root / UNREADY
    try:
        _refuse_other_disks(folder, list(corruption))
        shutil.rmtree(workshop, ignore_errors=True)
        workshop.mkdir()
        with find_restored(manifest, corruption, source, workshop) as (root, restored):
            tasks = list(_make_tasks(manifest, corruption, workshop, root, restored))
            progress = Progress(f"{manifest.split} (repairing)", len(tasks), "shards")
            with closing(progress), closing(run_tasks(rewrite_shard, tasks, num_workers)) as finished:
                results = {}
                for _, result in finished:
                    results[result.shard.name] = result
                    progress.add(1, result.shard.num_bytes)
        if source is not None:
            _refuse_missing(manifest, corruption, results)
        _write_manifest(manifest, results, workshop)
        os.rename(workshop, folder / READY)
        sync_folder(folder)
    except OSError as error:
        what, got = "cannot write the repaired shards", f"{error.filename or workshop} ({error.strerror})"
        raise UserError(what, got=got, hint="resolve the error and start again; nothing was changed") from None
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    finish_repair(folder)
    for name, result in results.items():
        print("".join(f"{folder}/{name}: removed {member}\n" for member in result.removed), end="")
    repaired = read_manifest(folder)
    num_restored = sum(result.num_restored for result in results.values())
    state = (
        "the manifest is as it was"
        if repaired.digest == manifest.digest
        else ("its digest has changed: runs that began with the old one cannot resume with it")
    )
    print(
        f"{manifest.split}: {len(results):,} shards rewritten, {num_restored:,} samples restored from the source, "
        f"{manifest.num_samples - repaired.num_samples:,} left out, {repaired.num_samples:,} remain; {state}: {folder}",
        flush=True,
    )


def finish_repair(folder: Path) -> None:
    """Move the files in `.repair` to their places, and remove shards without any sample left.

    Raises:
        UserError: A file cannot be moved.
    """
    try:
        _finish(folder, folder / READY)
    except OSError as error:
        got = f"{error.filename or folder} ({error.strerror})"
        raise UserError("cannot finish a repair", got=got, hint="resolve the error and start --repair again") from None


def _finish(folder: Path, ready: Path) -> None:
    if (ready / FILE_NAME).exists():  # else only the empty folder is left
        old, new = (_shard_names(path / FILE_NAME) for path in (folder, ready))
        moved = sorted(os.listdir(ready))
        for name in (name for name in moved if name in new):
            os.replace(ready / name, (folder / name).resolve())  # a link stays one, to the new shard
        for name in old - new:
            (folder / name).resolve().unlink(missing_ok=True)
            (folder / name).unlink(missing_ok=True)
        sync_folder(folder)
        for name in (name for name in moved if name.endswith(".npy")):
            os.replace(ready / name, folder / name)
        os.replace(ready / FILE_NAME, folder / FILE_NAME)
        sync_folder(folder)
    shutil.rmtree(ready)


def _shard_names(path: Path) -> set[str]:
    names = {str(shard["name"]) for shard in json.loads(path.read_bytes())["shards"]}
    assert all(name == os.path.basename(name) for name in names), "verify refuses such a manifest"
    return names


def _refuse_other_disks(folder: Path, names: list[str]) -> None:
    """Refuse shards that are links to another disk, which a rename cannot reach."""
    device = folder.stat().st_dev
    for name in names:
        target = (folder / name).resolve()
        if target.parent.stat().st_dev != device:
            raise UserError(
                "a corrupt shard is a link to another disk",
                got=f"{folder / name} -> {target}",
                expected=f"tars on the disk of {folder}",
                hint="put the tar itself in the place of the link; nothing was changed",
            )


def _refuse_missing(manifest: Manifest, corruption: Corruption, results: dict[str, Result]) -> None:
    missing = []
    for shard, first in zip(manifest.shards, manifest.first[:-1], strict=True):
        there = set((first + results[shard.name].rows).tolist()) if shard.name in results else set()
        missing += [key or f"sample {i}" for i, key in sorted(corruption.get(shard.name, {}).items()) if i not in there]
    if missing:
        more = f" and {len(missing) - 20:,} more" if len(missing) > 20 else ""
        raise UserError(
            f"the source lacks {len(missing):,} of the corrupt samples",
            got=", ".join(missing[:20]) + more,
            expected="files with the very bytes that were sharded (what --short-side re-encoded is in no source)",
            hint="name the right source; or repair without --source, which leaves them out; this split was not changed",
        )


def rewrite_shard(task: Task) -> Result:
    """Copy the kept samples byte for byte with their headers, and write restored ones as `data_prep.shard` does."""
    path = task.folder / task.path.name
    rows, offsets = [], []
    num_restored = 0
    with ExitStack() as stack:
        output = TarWriter(stack.enter_context(DirectFile(path)))
        contents = None
        if task.path.exists():
            contents = Contents(stack.enter_context(TarReader(task.path)))
        kept_keys = {contents.key_at[place] for place in task.kept.values()} if contents else set()
        used_keys = set(kept_keys)
        for row in range(task.num_samples):
            if row in task.kept:
                assert contents is not None
                offset = _copy(contents, task.kept[row], output)
            elif sample := next((s for s in task.restored.get(row, []) if encode_key(s.path) not in used_keys), None):
                try:
                    members = sample_members(read_place(task.root, sample.place), sample.path, sample.label)
                except ValueError:  # not an image of a known format
                    continue
                offset = output.add(members)
                used_keys.add(encode_key(sample.path))
                num_restored += 1
            else:
                continue
            rows.append(row)
            offsets.append(offset)
        removed = []
        if contents is not None:
            of_samples = used_keys | task.corrupt_keys
            for piece in (piece for key, piece in contents.members if key not in of_samples):
                if rows and not _may_be_lost(task, piece):
                    _copy_piece(contents, piece, output)
                else:
                    removed.append(piece.name)
        output.finish()
    if not rows:
        path.unlink()
    shard = Shard(task.path.name, len(rows), output.num_bytes, output.sha256.hexdigest())
    return Result(shard, np.array(rows, np.int64), np.array(offsets, np.int64), num_restored, removed)


def _copy(contents: Contents, place: int, output: TarWriter) -> int:
    offset = -1
    for piece in contents.pieces(contents.key_at[place]):
        if piece.offset == place:
            offset = output.num_bytes + place - piece.start
        _copy_piece(contents, piece, output)
    assert offset >= 0, "a kept sample has no image"
    return offset


def _copy_piece(contents: Contents, piece: Piece, output: TarWriter) -> None:
    size = piece.end - piece.start
    output.append(contents.tar.read(piece.start, size).ljust(size, b"\0"))  # a truncated tar may lack the padding


def _may_be_lost(task: Task, piece: Piece) -> bool:
    """Return whether a member under a key of its own may belong to a sample whose image is lost."""
    extension = split_name(piece.name)[1]
    if extension in IMAGES:
        return piece.size in task.lost_sizes
    return bool(task.lost_sizes) and extension in ("", "cls", "json")


def _make_tasks(
    manifest: Manifest, corruption: Corruption, workshop: Path, root: Path, restored: dict[int, list[Restored]]
) -> Iterator[Task]:
    for shard, first in zip(manifest.shards, manifest.first[:-1], strict=True):
        if shard.name in corruption:
            samples = {int(first) + row: row for row in range(shard.num_samples)}
            lost = corruption[shard.name]
            kept = {row: int(manifest.offset[sample]) for sample, row in samples.items() if sample not in lost}
            again = {samples[sample]: restored[sample] for sample in lost if sample in restored}
            keys = frozenset(key for key in lost.values() if key is not None)
            sizes = frozenset(int(manifest.length[sample]) for sample, key in lost.items() if key is None)
            yield Task(manifest.root / shard.name, workshop, shard.num_samples, kept, root, again, keys, sizes)


def _write_manifest(manifest: Manifest, results: dict[str, Result], workshop: Path) -> None:
    offset = np.array(manifest.offset)
    keep = np.ones(manifest.num_samples, bool)
    shards = []
    for shard, begin, end in zip(manifest.shards, manifest.first[:-1], manifest.first[1:], strict=True):
        result = results.get(shard.name)
        if result is not None:
            keep[begin:end] = False
            keep[begin + result.rows] = True
            offset[begin + result.rows] = result.offset
            shard = result.shard if manifest.crc32 is not None else replace(result.shard, sha256=None)
        if shard.num_samples:
            shards.append(shard)
    if not shards:
        raise UserError(
            "no sample would be left", got=manifest.root, hint="delete the folder and shard the source again"
        )
    columns = {name: column[keep] for name, column in (manifest.columns | {"offset": offset}).items()}
    write_manifest(workshop, manifest.split, manifest.classes, shards, columns)
