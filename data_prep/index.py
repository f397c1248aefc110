"""Write the manifest of existing tars: `python -m data_prep.index DIR`.

Shards that `data_prep.shard --part I/N` wrote get a manifest from their sidecars. Tars made by others are indexed in
one pass, which reads headers and labels only, or with `--checksums` all bytes. The tars are never changed.

The split of a tar follows from train or val (validation) in its name, or in that of its folder. The manifest is written
beside the tars. If tars of both splits are in one folder DIR, the manifests are in DIR/train and DIR/val, beside
symbolic links to the tars, since a manifest's shards must be in its folder.
"""

import argparse
import json
import os
import re
import time
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shards.samples import Result, Task, index_tar
from data_prep.shards.sidecar import has_sidecars, merge
from data_prep.shards.timm_info import write_timm_info
from data_prep.sources.class_map import read_class_map
from data_prep.workers import Progress, default_workers, run_tasks
from gcvit.data.manifest import COMPRESSED, FILE_NAME, Manifest, read_manifest, write_manifest
from gcvit.errors import UserError
from gcvit.runtime.command_line import check_at_least_one, command_parser
from gcvit.runtime.entrypoint import run_main

SPLITS = ("train", "val")
# Words in the names of tars and folders, and the split that they mean. "test" may come without labels.
WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
INFO = ("_info.json", "info.json", "dataset_info.json", "dataset_infos.json")
UNPACK = {".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}
AGAIN = "delete it and start the same command again"
MAX_SHOWN = 100
POOL_SECONDS = 1.0  # of work for one process, below which it is done before others have started


@dataclass(frozen=True)
class Split:
    """Tars of one split, sorted by name, and the folder that gets the manifest: theirs, or one of links to them."""

    name: str
    folder: Path
    tars: list[Path]


def find_splits(root: Path, wanted: str | None) -> list[Split]:
    """Find the tars in `root`, or else in its folders for train and val, by split.

    Raises:
        UserError: There are none, or the split of one is not clear.
    """
    if not root.is_dir():
        raise UserError("the folder of tars is no folder", got=root, hint="check the path")
    groups: dict[str | None, list[Path]] = {}
    if tars := _list_tars(root):
        for path in tars:
            groups.setdefault(_split_of(path.name), []).append(path)
    else:
        for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name.lower() in WORDS):
            groups.setdefault(WORDS[folder.name.lower()], []).extend(_list_tars(folder))
    if len(groups) == 1 and groups.keys() <= {None, "test"}:
        [(named, tars)] = groups.items()
        groups = {wanted or named or WORDS.get(root.resolve().name.lower(), "train"): tars}
    if None in groups:
        raise UserError(
            "the names of some tars have no split, those of others do",
            got=groups[None][0],
            expected=f"names with one of {', '.join(WORDS)}; or all without",
            hint="rename them, or move them to folders train and val",
        )
    found = [_place(root, name, groups[name], len(groups) > 1) for name in SPLITS if groups.get(name)]
    found = [split for split in found if wanted in (None, split.name)]
    if not found:
        raise UserError(
            f"no tars of split {wanted or 'train or val'} here",
            got=root,
            expected="DIR/*.tar, or DIR/train/*.tar and DIR/val/*.tar",
            hint="check the path; --split names the split of tars without one in their names",
        )
    return found


def _place(root: Path, name: str, tars: list[Path], is_mixed: bool) -> Split:
    parents = sorted({path.parent for path in tars})
    if len(parents) > 1:
        raise UserError(f"several folders are of split {name}", got=", ".join(map(str, parents)), hint="merge them")
    stays = parents[0].name == name if parents[0] != root else not is_mixed
    return Split(name, parents[0] if stays else root / name, tars)


def _list_tars(folder: Path) -> list[Path]:
    names = sorted(os.listdir(folder))
    for name in names:
        if name.endswith(COMPRESSED):
            raise UserError(
                "a compressed tar cannot be read at an offset",
                got=folder / name,
                expected=".tar",
                hint=f"{UNPACK[os.path.splitext(name)[1]]} it (images do not compress further)",
            )
    return [folder / name for name in names if name.endswith(".tar") and not name.startswith(".")]


def _split_of(name: str) -> str | None:
    """Return the split in a tar's name, such as val for "imagenet1k-validation-00.tar"; None if it is not clear."""
    found = {WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in WORDS}
    return found.pop() if len(found) == 1 else None


def read_classes(root: Path, class_map: Path | None) -> tuple[str, ...] | None:
    """Read the names of the classes from the file of `--classes`, else from an info file in `root`, else None."""
    if class_map is not None:
        return read_class_map(class_map)
    for path in (root / name for name in INFO):
        try:
            names = _find_names(json.loads(path.read_bytes()))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise UserError("cannot read the info file of the tars", got=f"{path} ({error})") from None
        if names is not None:
            return tuple(names)
    return None


def _find_names(info: Any) -> list[str] | None:
    """Find the first list of texts called names, classes or class_names: writers put it in different places."""
    if isinstance(info, list):
        info = dict(enumerate(info))
    if not isinstance(info, dict):
        return None
    for name in ("names", "classes", "class_names"):
        found = info.get(name)
        if isinstance(found, list) and found and all(isinstance(item, str) for item in found):
            return found
    return next((found for value in info.values() if (found := _find_names(value)) is not None), None)


def index(split: Split, label_of: dict[str, int], checksums: bool, num_workers: int) -> list[Result]:
    """Index the tars of a split, in several processes if the work is long; the results are in the order of the tars."""
    tasks = [Task(path, label_of, checksums) for path in split.tars]
    start = time.monotonic()
    results = {0: index_tar(tasks[0])}
    if (time.monotonic() - start) * len(tasks) < POOL_SECONDS:
        num_workers = 1
    progress = Progress(split.name, len(tasks) - 1, "tars")
    with closing(progress), closing(run_tasks(index_tar, tasks[1:], num_workers)) as finished:
        for number, result in finished:
            results[number + 1] = result
            progress.add(1)
    return [results[number] for number in range(len(tasks))]


def save_manifest(split: Split, results: list[Result], classes: tuple[str, ...], are_given: bool) -> str:
    """Write the manifest of the tars, unless there is one already. Only missing checksums are added to an existing one.

    Args:
        are_given: Whether the user named the classes: then those of an existing manifest must be the same.

    Returns:
        What was done, in words.

    Raises:
        UserError: An existing manifest is of other samples, or writing fails.
    """
    shards = tuple(result.shard for result in results)
    columns = {name: np.concatenate([result.columns[name] for result in results]) for name in results[0].columns}
    here = Manifest(split.folder, split.name, classes, shards, **columns)
    if (split.folder / FILE_NAME).exists():
        there = read_manifest(split.folder)
        if difference := _compare(there, here, are_given):
            raise UserError(
                f"the manifest is not of these tars: {split.folder / FILE_NAME}",
                got=difference,
                hint=f"if it is stale, {AGAIN}; if the tars are corrupt, python -m data_prep.verify lists where",
            )
        if here.crc32 is None or there.crc32 is not None:
            return "are indexed already"
        here = replace(here, classes=there.classes)
    try:
        if split.tars[0].parent != split.folder:
            _link(split)
        write_manifest(split.folder, here.split, here.classes, here.shards, here.columns)
    except OSError as error:
        raise UserError("cannot write the manifest", got=f"{split.folder} ({error.strerror})") from None
    return "indexed" if here.crc32 is None else "indexed with checksums"


def _compare(there: Manifest, here: Manifest, compare_classes: bool) -> str | None:
    """Describe how two manifests differ in the columns that both have; None if they do not."""
    both = set(there.columns) & set(here.columns)
    if there.split != here.split:
        return f"split {there.split}, not {here.split}"
    if compare_classes and there.classes != here.classes:
        return "other names of classes"
    for old, new in zip_longest(there.shards, here.shards):
        if old is None or new is None:
            return f"{(old or new).name} is only {'in the manifest' if new is None else 'in the folder'}"
        if "crc32" not in both:
            old, new = replace(old, sha256=None), replace(new, sha256=None)
        if old != new:
            return f"{old} in the manifest, {new} in the folder"
    for name in sorted(both):
        if not np.array_equal(there.columns[name], here.columns[name]):
            return f"another {name} of sample {int(np.argmax(there.columns[name] != here.columns[name]))}"
    return None


def _link(split: Split) -> None:
    split.folder.mkdir(exist_ok=True)
    for path in split.tars:
        link = split.folder / path.name
        target = os.path.relpath(path, split.folder)
        if link.is_symlink() and os.readlink(link) == target:
            continue
        if os.path.lexists(link):
            raise UserError("a tar is in the way of a link to one", got=link, expected=f"a link to {target}")
        link.symlink_to(target)


def report_unusable(split: Split, results: list[Result], skip_unusable: bool) -> None:
    """Print the tars and samples that cannot be indexed.

    Raises:
        UserError: There is such a tar; or such a sample, and `skip_unusable` is False.
    """
    tars = [f"{path}: {result.refused}" for path, result in zip(split.tars, results, strict=True) if result.refused]
    pairs = zip(split.tars, results, strict=True)
    samples = [f"{path}: {problem}" for path, result in pairs for problem in result.problems]
    for lines, kind in ((tars, "tars"), (samples, "samples")):
        print("".join(f"{line}\n" for line in lines[:MAX_SHOWN]), end="")
        if len(lines) > MAX_SHOWN:
            print(f"... and {len(lines) - MAX_SHOWN:,} more {kind}")
    if tars:
        more = f" and {len(tars) - 1:,} more" if len(tars) > 1 else ""
        hint = "unpack it" if ": compressed" in tars[0] else "copy it again, or move it away"
        raise UserError("a tar cannot be indexed", got=tars[0] + more, hint=hint)
    if samples and not skip_unusable:
        raise UserError(
            f"{len(samples):,} keys are no samples",
            got=samples[0],
            expected="an image, and a label in KEY.cls or KEY.json; a key ends at the first dot of a file's name",
            hint="correct the tars, or leave these out with --skip-unusable; nothing was written",
        )


def number_classes(names: tuple[str, ...] | None, results: list[Result]) -> tuple[str, ...]:
    """Return the names, or if there are none the labels themselves, "0000" and so on.

    Raises:
        UserError: There are fewer names than labels.
    """
    num_classes = 1 + max(int(result.columns["label"].max()) for result in results)
    if names is None:
        return tuple(f"{label:04d}" for label in range(num_classes))
    if num_classes > len(names):
        raise UserError(
            "a label is beyond the names of the classes",
            got=f"label {num_classes - 1}",
            expected=f"0 to {len(names) - 1}",
            hint="--classes FILE names them all, one a line",
        )
    return names


HELP = """Write the manifest of existing shards, which are not changed.

    python -m data_prep.index /data/others-wds --checksums
    python -m data_prep.index /data/imagenet-wds

The first line is for tars made by others, the second for shards of data_prep.shard --part.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser("data_prep.index", "DIR [flags]", HELP)
    add = parser.add_argument_group("where").add_argument
    add("dir", metavar="DIR", type=Path, help="folder of tars, or of train/ and val/ with tars")
    add("--workers", type=int, default=default_workers(), metavar="N", help="processes (%(default)s)")
    add = parser.add_argument_group("of tars made by others").add_argument
    add("--split", choices=SPLITS, help="this split alone; also that of tars without one in their names")
    add("--classes", type=Path, metavar="FILE", help="classes in the order of labels, a line each; or imagenet")
    add("--checksums", action="store_true", help="read all bytes: SHA-256 of tars, crc32 of images")
    add("--skip-unusable", action="store_true", help="leave out samples without one image and one label")
    args = parser.parse_args(arguments)
    check_at_least_one(workers=args.workers)
    sharded = [folder for folder in (args.dir, *(args.dir / name for name in SPLITS)) if has_sidecars(folder)]
    for folder in sharded:
        manifest = merge(folder)
        num_shards = len(manifest.shards)
        print(f"{manifest.split}: merged {num_shards:,} shards of {manifest.num_samples:,} samples: {folder}")
    if sharded:
        write_timm_info(args.dir)
    else:
        index_others_tars(args)


def index_others_tars(args: argparse.Namespace) -> None:
    """Index all splits, then write their manifests: errors come before anything is written."""
    splits = find_splits(args.dir, args.split)
    names = read_classes(args.dir, args.classes)
    label_of = {name: label for label, name in enumerate(names or ())}
    start = time.monotonic()
    indexed = [(split, index(split, label_of, args.checksums, args.workers)) for split in splits]
    seconds = max(time.monotonic() - start, 1e-9)
    for split, results in indexed:
        report_unusable(split, results, args.skip_unusable)
    classes = number_classes(names, [result for _, results in indexed for result in results])
    for split, results in indexed:
        done = save_manifest(split, results, classes, args.classes is not None)
        num_samples = sum(result.shard.num_samples for result in results)
        num_bytes = sum(result.shard.num_bytes for result in results)
        print(
            f"{split.name}: {num_samples:,} samples in {len(results):,} tars, {num_bytes / 1e6:,.1f} MB, {done}: "
            f"{split.folder}"
        )
    num_samples = sum(result.shard.num_samples for _, results in indexed for result in results)
    print(f"{len(classes):,} classes, {seconds:.1f} s, {num_samples / seconds:,.0f} samples/s")


if __name__ == "__main__":
    run_main(main)
