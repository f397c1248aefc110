"""Class folders of images -> WebDataset tars with a manifest: `python -m data_prep.shard SOURCE OUT`.

The samples' order is a seeded permutation of the sorted paths, so that every shard is a fair sample of the
classes. Neither clocks nor users nor the number of workers leave a trace: the same source, seed and shard
size give the same bytes.

Nothing is overwritten but what an interrupted run of the same plan left, which `.sharding.json` tells; the
manifest comes last, and a folder with a manifest is complete.
"""

import argparse
import hashlib
import json
import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.pool import Progress, default_workers, run_tasks
from data_prep.sources import Source, find_sources
from data_prep.writer import Result, Task, write_shard
from gcvit.data.manifest import COLUMNS, FILE_NAME, Manifest, holds_shards, read_manifest, write_manifest
from gcvit.errors import UserError, run_main

MARK = ".sharding.json"  # stands in a folder while its shards are incomplete


@dataclass(frozen=True)
class Plan:
    """What goes where: shard i holds samples `order[i * shard_size : (i + 1) * shard_size]` of the source."""

    source: Source
    folder: Path
    seed: int
    shard_size: int

    @property
    def num_shards(self) -> int:
        return -(-len(self.source.paths) // self.shard_size)

    def shard_name(self, number: int) -> str:
        return f"{self.source.split}-{number:06d}.tar"

    @property
    def digest(self) -> str:
        source = self.source
        listing = [source.split, source.classes, source.paths, source.labels, self.seed, self.shard_size]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def tasks(self, write: bool) -> list[Task]:
        # RandomState, whose stream NumPy promises never to change, unlike that of its newer generators.
        order = np.random.RandomState(self.seed).permutation(len(self.source.paths))
        tasks = []
        for number in range(self.num_shards):
            chosen = order[number * self.shard_size : (number + 1) * self.shard_size]
            paths = [self.source.paths[i] for i in chosen]
            labels = [self.source.labels[i] for i in chosen]
            tasks.append(Task(self.source.root, paths, labels, self.folder / self.shard_name(number), write))
        return tasks


def is_complete(plan: Plan) -> bool:
    """Whether the folder has a manifest already; False where it is new, empty or interrupted.

    Errors: UserError where it holds anything else, of which nothing is touched.
    """
    folder = plan.folder
    if folder.resolve().is_relative_to(plan.source.root.resolve()):
        raise UserError("the output lies inside the source", got=folder, cure="choose a folder outside of it")
    if folder.exists() and not folder.is_dir():
        raise UserError("the output is no directory", got=folder, cure="choose another folder")
    if (folder / FILE_NAME).exists():
        return True
    found = sorted(os.listdir(folder)) if folder.exists() else []
    if MARK in found:
        try:
            if json.loads((folder / MARK).read_bytes())["plan"] == plan.digest:
                return False
        except (OSError, ValueError, LookupError, TypeError):
            pass
        what, cure = "the output holds an interrupted sharding of other files or options", "delete the folder"
    elif found and found != [f"{MARK}.tmp"]:
        what, cure = "the output is not empty", "empty it"
    else:
        return False
    cure += ", or choose another; nothing was changed"
    raise UserError(what, got=f"{folder} with {found[-1]}", cure=cure)


def compute(plan: Plan, num_workers: int, write: bool) -> tuple[Manifest, Progress]:
    """Write the plan's shards, or only compute them, and return the manifest that belongs to them.

    Errors: UserError for a file that is no image; what this run wrote is removed, since without that file the
    permutation is another and none of the shards can stay.
    """
    results: dict[int, Result] = {}
    title = f"{plan.source.split}{'' if write else ' (comparing)'}"
    progress = Progress(title, len(plan.source.paths))
    # Closing the iterator waits for the workers: only then may `_clear` take away what they wrote.
    with closing(progress), closing(run_tasks(write_shard, plan.tasks(write), num_workers)) as finished:
        for number, result in finished:
            results[number] = result
            progress.add(result.shard.num_samples, result.shard.num_bytes)
            if result.refused is not None:
                break
    refused = next((result.refused for result in results.values() if result.refused is not None), None)
    if refused is not None:
        if write:
            _clear(plan)
        formats = "JPEG, PNG, WebP, GIF, BMP, TIFF"
        raise UserError("a file is no image", got=refused, allowed=formats, cure="replace or remove it")
    in_order = [results[number] for number in range(plan.num_shards)]
    columns = {name: np.concatenate([result.columns[name] for result in in_order]) for name in COLUMNS}
    shards = tuple(result.shard for result in in_order)
    return Manifest(plan.folder, plan.source.split, plan.source.classes, shards, **columns), progress


def _clear(plan: Plan) -> None:
    for number in range(plan.num_shards):
        path = plan.folder / plan.shard_name(number)
        path.unlink(missing_ok=True)
        Path(f"{path}.tmp").unlink(missing_ok=True)
    (plan.folder / MARK).unlink(missing_ok=True)


def write_plan(plan: Plan, num_workers: int) -> None:
    """Fill an empty or interrupted folder."""
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        temporary = plan.folder / f"{MARK}.tmp"
        temporary.write_text(json.dumps({"plan": plan.digest}))
        os.replace(temporary, plan.folder / MARK)
    except OSError as error:
        raise UserError("cannot write the output", got=f"{plan.folder} ({error.strerror})") from None
    manifest, progress = compute(plan, num_workers, write=True)
    columns = {name: getattr(manifest, name) for name in COLUMNS}
    write_manifest(plan.folder, manifest.split, manifest.classes, manifest.shards, columns)
    (plan.folder / MARK).unlink()
    print(
        f"{manifest.split}: {manifest.num_samples:,} samples of {len(manifest.classes):,} classes in "
        f"{len(manifest.shards):,} shards, {progress.num_bytes / 1e6:,.1f} MB, {progress.seconds:.1f} s "
        f"({progress.rate}): {plan.folder}"
    )


def compare_plan(plan: Plan, num_workers: int) -> None:
    """Say so where the folder holds exactly what this plan would write. Errors: UserError where not."""
    there = read_manifest(plan.folder)
    source = plan.source
    here = (source.split, source.classes, len(source.paths))
    alike = here == (there.split, there.classes, there.num_samples)  # if not, spare the reading of all files
    if not (alike and compute(plan, num_workers, write=False)[0].digest == there.digest):
        raise UserError(
            "the output holds other shards",
            got=f"{plan.folder} with {there.num_samples:,} samples, split {there.split}",
            cure="delete the folder, or choose another; nothing was changed",
        )
    (plan.folder / MARK).unlink(missing_ok=True)
    print(f"{there.split}: {there.num_samples:,} samples are there already, byte for byte: {plan.folder}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.shard",
        description="Class folders of images -> WebDataset tars with a manifest.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="folder of class folders, or of train/ and val/ above them")
    parser.add_argument("out", type=Path, help="new folder; gets train/ and val/ too where SOURCE has them")
    parser.add_argument("--split", choices=("train", "val"), help="a single tree's split; train where absent")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes")
    parser.add_argument("--shard-size", type=int, default=1000, help="samples per shard")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples' order")
    args = parser.parse_args(arguments)
    for name, value in [("--workers", args.workers), ("--shard-size", args.shard_size)]:
        if value < 1:
            raise UserError(f"{name} is too small", got=value, allowed="at least 1")
    if not 0 <= args.seed < 2**32:
        raise UserError("--seed is out of range", got=args.seed, allowed="0 to 2^32 - 1")

    sources = find_sources(args.source, args.split)
    has_splits = sources[0].root != args.source
    if has_splits and holds_shards(args.out):
        what = "the output holds shards of a single tree"
        raise UserError(what, got=args.out, cure="choose another folder for the source's train/ and val/")
    folders = [args.out / source.split if has_splits else args.out for source in sources]
    pairs = zip(sources, folders, strict=True)
    plans = [Plan(source, folder, args.seed, args.shard_size) for source, folder in pairs]
    # What is refused is refused before a byte is written, so folders to compare come first.
    complete = [plan for plan in plans if is_complete(plan)]
    for plan in complete:
        compare_plan(plan, args.workers)
    for plan in plans:
        if plan not in complete:
            write_plan(plan, args.workers)


if __name__ == "__main__":
    run_main(main)
