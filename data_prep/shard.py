"""Pack images into WebDataset tars with a manifest: `python -m data_prep.shard SOURCE OUT`.

The order of samples is a seeded permutation of the sorted paths, so that every shard is a fair sample of the classes.
The same source, seed, shard size and reduction give the same bytes, on any number of workers and parts.

If the command is killed, the same command continues: a shard with a sidecar is complete and is not written again. With
`--part I/N`, many nodes that share only OUT each write every N-th shard, and `python -m data_prep.index OUT` makes the
manifest when all parts are complete. `.sharding.json` identifies the plan of a folder; files of another plan are never
overwritten. A folder with a manifest is complete. If the content of a source file changes while a plan is unfinished,
shards that were complete before keep the old content.

Files that are no images are listed when all other shards are written. Replace them, and the same command writes the
missing shards. If they are removed instead, the permutation changes: then delete OUT first.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_prep.images import Reduction
from data_prep.shards.sidecar import MARK, Mark, Sidecar, has_sidecars, merge, read_mark, read_sidecar, write_mark
from data_prep.shards.tar_writer import Task, write_shard
from data_prep.shards.timm_info import write_timm_info
from data_prep.sources.discover import KINDS, Source, find_sources, spooled
from data_prep.workers import Progress, default_workers, run_tasks
from gcvit.data.image_files import FORMATS
from gcvit.data.manifest import FILE_NAME, holds_shards, read_manifest
from gcvit.errors import UserError
from gcvit.runtime.command_line import check_at_least_one, command_parser
from gcvit.runtime.entrypoint import run_main

DEFAULT_QUALITY = 90


@dataclass(frozen=True)
class Part:
    """The shards k with k mod `count` = `index`: 0 <= index < count."""

    index: int = 0
    count: int = 1

    def shard_numbers(self, num_shards: int) -> range:
        """Return the numbers of this part's shards."""
        return range(self.index, num_shards, self.count)


@dataclass(frozen=True)
class Plan:
    """The plan of a sharding: shard i holds samples `order[i * shard_size : (i + 1) * shard_size]` of the source."""

    source: Source
    folder: Path
    seed: int
    shard_size: int
    reduction: Reduction | None

    @cached_property
    def mark(self) -> Mark:
        """Compute the digest of everything that determines the shards, with split, classes and number of shards."""
        source, reduction = self.source, self.reduction
        options = [source.split, source.classes, self.seed, self.shard_size]
        options += [] if reduction is None else [reduction.short_side, reduction.quality]
        digest = hashlib.sha256(json.dumps(options).encode())
        for begin in range(0, len(source.paths), 1 << 16):  # in pieces: ImageNet-21K has 14 million paths
            piece = slice(begin, begin + (1 << 16))
            digest.update(json.dumps([source.paths[piece], source.labels[piece]]).encode())
        return Mark(digest.hexdigest(), source.split, source.classes, -(-len(source.paths) // self.shard_size))

    @cached_property
    def order(self) -> np.ndarray:
        """Permutation of the samples: int64 [N]."""
        # RandomState, whose stream NumPy promises never to change, unlike that of its newer generators.
        return np.random.RandomState(self.seed).permutation(len(self.source.paths))

    def tar_path(self, number: int) -> Path:
        """Return the path of a shard."""
        return self.folder / self.mark.shard_name(number)

    def samples(self, number: int) -> np.ndarray:
        """Return the numbers of a shard's samples: int64 [n]."""
        return self.order[number * self.shard_size : (number + 1) * self.shard_size]

    def tasks(self, numbers: list[int], source: Source, write: bool) -> Iterator[Task]:
        """Yield a task per shard, with the places of the samples in `source`."""
        for number in numbers:
            chosen = self.samples(number).tolist()
            places = [source.place(i) for i in chosen]
            paths = [self.source.paths[i] for i in chosen]
            labels = [self.source.labels[i] for i in chosen]
            path = self.tar_path(number)
            yield Task(source.root, places, paths, labels, path, self.mark.plan, self.reduction, write)


@dataclass(frozen=True)
class Row:
    """Summary of a split: all its shards, and the throughput of those that this run wrote."""

    split: str
    num_samples: int
    num_classes: int
    num_shards: int
    num_bytes: int
    num_saved_bytes: int
    num_written_samples: int
    num_written_bytes: int
    seconds: float
    folder: Path

    @classmethod
    def of(cls, mark: Mark, sidecars: list[Sidecar], written: list[Sidecar], seconds: float, folder: Path) -> "Row":
        """Sum up the `sidecars` of a split, of which this run wrote the `written` ones in `seconds`."""
        return cls(
            split=mark.split,
            num_samples=sum(sidecar.shard.num_samples for sidecar in sidecars),
            num_classes=len(mark.classes),
            num_shards=len(sidecars),
            num_bytes=sum(sidecar.shard.num_bytes for sidecar in sidecars),
            num_saved_bytes=sum(
                sidecar.num_source_bytes - int(sidecar.columns["length"].sum()) for sidecar in sidecars
            ),
            num_written_samples=sum(sidecar.shard.num_samples for sidecar in written),
            num_written_bytes=sum(sidecar.shard.num_bytes for sidecar in written),
            seconds=seconds,
            folder=folder,
        )


def print_summary(rows: list[Row]) -> None:
    """Print a line per split; the column of saved bytes only if some image was re-encoded."""
    columns = {
        "split": [row.split for row in rows],
        "samples": [f"{row.num_samples:,}" for row in rows],
        "classes": [f"{row.num_classes:,}" for row in rows],
        "shards": [f"{row.num_shards:,}" for row in rows],
        "bytes": [f"{row.num_bytes:,}" for row in rows],
        "saved": [f"{row.num_saved_bytes:,}" for row in rows],
        "seconds": [f"{row.seconds:.1f}" for row in rows],
        "samples/s": [f"{row.num_written_samples / max(row.seconds, 1e-9):,.0f}" for row in rows],
        "MB/s": [f"{row.num_written_bytes / max(row.seconds, 1e-9) / 1e6:,.1f}" for row in rows],
    }
    if not any(row.num_saved_bytes for row in rows):
        del columns["saved"]
    widths = [max(map(len, [name, *cells])) for name, cells in columns.items()]
    lines = [[*columns, "folder"]]
    lines += [[*cells, str(row.folder)] for *cells, row in zip(*columns.values(), rows, strict=True)]
    for *cells, folder in lines:
        print(*(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)), folder, sep="  ", flush=True)


def is_complete(plan: Plan) -> bool:
    """Return whether the folder has a manifest already; False if it is new, empty or interrupted.

    Raises:
        UserError: The folder holds anything else; nothing was changed.
    """
    folder = plan.folder
    if folder.resolve().is_relative_to(plan.source.root.resolve()):
        raise UserError("the output lies inside the source", got=folder, hint="choose a folder outside of it")
    if folder.exists() and not folder.is_dir():
        raise UserError("the output is no directory", got=folder, hint="choose another folder")
    # In this order, since other parts may be running: the mark is written first, and removed after the manifest.
    found = [name for name in _list(folder) if not (name.startswith(MARK) and name.endswith(".tmp"))]
    is_begun = has_sidecars(folder)
    if (folder / FILE_NAME).exists():
        return True
    if is_begun:
        mark = read_mark(folder)
        if mark is not None and mark.plan == plan.mark.plan:
            return False
        what, hint = "the output holds an interrupted sharding of other files or options", "delete the folder"
    elif found:
        what, hint = "the output is not empty", "empty it"
    else:
        return False
    hint += ", or choose another; nothing was changed"
    raise UserError(what, got=f"{folder} with {(found or [MARK])[-1]}", hint=hint)


def _list(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


def compute(plan: Plan, numbers: list[int], num_workers: int, write: bool) -> tuple[dict[int, Sidecar], float]:
    """Write these shards of a plan, or only compute them.

    Returns:
        Their sidecars by number, and the seconds it took.

    Raises:
        UserError: Some files are no images; all shards without one are written before.
    """
    sidecars: dict[int, Sidecar] = {}
    refused: list[str] = []
    chosen = np.concatenate([plan.samples(number) for number in numbers])
    progress = Progress(f"{plan.source.split}{'' if write else ' (comparing)'}", len(chosen))
    with closing(progress), spooled(plan.source, chosen, plan.folder) as source:
        tasks = plan.tasks(numbers, source, write)
        with closing(run_tasks(write_shard, tasks, num_workers)) as finished:
            for index, result in finished:
                refused += [f"{plan.source.root}/{path}" for path in result.refused]
                num_bytes = 0
                if result.sidecar is not None:
                    sidecars[numbers[index]] = result.sidecar
                    num_bytes = result.sidecar.shard.num_bytes
                progress.add(len(plan.samples(numbers[index])), num_bytes)
    if refused:
        what = "a file is no image" if len(refused) == 1 else f"{len(refused):,} files are no images"
        more = f" and {len(refused) - 10:,} more" if len(refused) > 10 else ""
        hint = "replace and start the same command again, or remove"
        hint += f" and delete {plan.folder} too, since the order of all samples changes" if write else ""
        raise UserError(what, got=", ".join(sorted(refused)[:10]) + more, expected=", ".join(FORMATS), hint=hint)
    return sidecars, progress.seconds


def begin_plan(plan: Plan) -> None:
    """Make the folder and its mark, unless they exist.

    Raises:
        UserError: They cannot be written.
    """
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        if not has_sidecars(plan.folder):
            write_mark(plan.folder, plan.mark)
    except OSError as error:
        raise UserError("cannot write the output", got=f"{plan.folder} ({error.strerror})") from None


def write_plan(plan: Plan, part: Part, num_workers: int) -> Row:
    """Write a part's missing shards; if it is the only part, make the manifest, too."""
    folder, mark = plan.folder, plan.mark
    begin_plan(plan)  # again: another process may have completed the folder since
    numbers = part.shard_numbers(mark.num_shards)
    kept = {number: read_sidecar(plan.tar_path(number), mark.plan) for number in numbers}
    sidecars = {number: sidecar for number, sidecar in kept.items() if sidecar is not None}
    missing = [number for number in numbers if number not in sidecars]
    _remove_strays(plan, missing)
    if sidecars:
        print(f"{mark.split}: {len(sidecars):,} of {len(numbers):,} shards are complete already: {folder}", flush=True)
    written: dict[int, Sidecar] = {}
    seconds = 0.0
    if missing:
        written, seconds = compute(plan, missing, num_workers, write=True)
    if part.count == 1:
        merge(folder)
    return Row.of(mark, list((sidecars | written).values()), list(written.values()), seconds, folder)


def _remove_strays(plan: Plan, numbers: list[int]) -> None:
    """Remove the temporary files of these shards that a killed run left; other parts may be writing theirs."""
    heads = {plan.tar_path(number).name for number in numbers}
    for name in _list(plan.folder):
        if name.endswith(".tmp") and name.partition(".tar")[0] + ".tar" in heads:
            (plan.folder / name).unlink(missing_ok=True)


def compare_plan(plan: Plan, part: Part, num_workers: int) -> None:
    """Check that the folder holds exactly the shards that this plan would write, and print that.

    Raises:
        UserError: The folder holds other shards.
    """
    manifest = merge(plan.folder) if has_sidecars(plan.folder) else read_manifest(plan.folder)
    source = plan.source
    planned = (source.split, source.classes, len(source.paths), plan.mark.num_shards)
    alike = planned == (manifest.split, manifest.classes, manifest.num_samples, len(manifest.shards))
    numbers = list(part.shard_numbers(plan.mark.num_shards))
    if alike and numbers:  # otherwise no file needs to be read
        sidecars, _ = compute(plan, numbers, num_workers, write=False)
        alike = all(sidecars[number].shard == manifest.shards[number] for number in numbers)
    if not alike:
        raise UserError(
            "the output holds other shards",
            got=f"{plan.folder} with {manifest.num_samples:,} samples, split {manifest.split}",
            hint="delete the folder, or choose another; nothing was changed",
        )
    print(
        f"{manifest.split}: {manifest.num_samples:,} samples are there already, byte for byte: {plan.folder}",
        flush=True,
    )


def parse_part(text: str) -> Part:
    """Parse a part such as "3/8", which is Part(3, 8).

    Raises:
        UserError: The text is not I/N with 0 <= I < N.
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError("--part is no part", got=text, expected="I/N with 0 <= I < N, from 0/8 to 7/8 for 8 parts")
    return Part(int(index), int(count))


HELP = """Pack images into shards: WebDataset tars with a manifest.

    python -m data_prep.shard /data/imagenet /data/imagenet-wds
    python -m data_prep.shard /data/flowers /data/flowers-wds --val-fraction 0.2
    python -m data_prep.shard /data/imagenet /data/imagenet-wds --part 3/16

If it was stopped, the same command continues. When all parts are complete, data_prep.index makes the manifest.
"""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = command_parser("data_prep.shard", "SOURCE OUT [flags]", HELP)
    add = parser.add_argument_group("source and output").add_argument
    add("source", metavar="SOURCE", type=Path, help=KINDS)
    add("out", metavar="OUT", type=Path, help="new folder; gets train/ and val/ where SOURCE has them")
    add = parser.add_argument_group("which images").add_argument
    add("--split", choices=("train", "val"), help="name of the split, for a source without its own (train)")
    add("--val-fraction", type=float, metavar="F", help="hold out this share of a source with one split")
    add("--classes", type=Path, metavar="FILE", help="classes in the order of labels, a line each; or imagenet")
    add = parser.add_argument_group("how images are stored").add_argument
    add("--shard-size", type=int, default=1000, metavar="N", help="samples in a shard (1000)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the order of samples (0)")
    add("--short-side", type=int, metavar="N", help="shrink images whose short side exceeds N pixels")
    add("--quality", type=int, metavar="N", help=f"quality of JPEGs that were shrunk, 1 to 100 ({DEFAULT_QUALITY})")
    add = parser.add_argument_group("workers").add_argument
    add("--workers", type=int, default=default_workers(), metavar="N", help="processes (%(default)s)")
    add("--part", metavar="I/N", help="every N-th shard from shard I on, for many nodes")
    args = parser.parse_args(arguments)
    check_at_least_one(workers=args.workers, shard_size=args.shard_size, short_side=args.short_side)
    if not 0 <= args.seed < 2**32:
        raise UserError("--seed is out of range", got=args.seed, expected="0 to 2^32 - 1")
    if args.quality is not None and args.short_side is None:
        what = "--quality has no effect: no image is re-encoded"
        raise UserError(what, got=f"--quality {args.quality}", hint="add --short-side, or leave it out")
    if args.quality is not None and not 1 <= args.quality <= 100:
        raise UserError("--quality is out of range", got=args.quality, expected="1 to 100")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    part = Part() if args.part is None else parse_part(args.part)
    reduction = None
    if args.short_side is not None:
        reduction = Reduction(args.short_side, DEFAULT_QUALITY if args.quality is None else args.quality)
    sources = find_sources(
        args.source, args.split, classes=args.classes, val_fraction=args.val_fraction, seed=args.seed
    )
    if sources[0].split_folder and holds_shards(args.out):
        what = "the output holds shards of a single tree"
        raise UserError(what, got=args.out, hint="choose another folder for the source's train/ and val/")
    plans = []
    for source in sources:
        folder = args.out / source.split if source.split_folder else args.out
        plans.append(Plan(source, folder, args.seed, args.shard_size, reduction))
    # Errors must come before a byte is written, so folders to compare come first.
    complete = [plan for plan in plans if is_complete(plan)]
    for plan in complete:
        compare_plan(plan, part, args.workers)
    begun = [plan for plan in plans if plan not in complete]
    for plan in begun:  # all, so that an index of OUT reports the val that a killed run had not begun
        begin_plan(plan)
    rows = [write_plan(plan, part, args.workers) for plan in begun]
    if rows:
        print_summary(rows)
    if part.count == 1:
        write_timm_info(args.out)
    elif rows:
        print(f"part {args.part} is complete; after the last part: python -m data_prep.index {args.out}")


if __name__ == "__main__":
    run_main(main)
