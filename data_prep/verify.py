"""Check shards against their manifest, to the last pixel: `python -m data_prep.verify OUT`.

Checked are hashes of shards and columns, order and number of members, labels in .cls and .json, checksums, and every
image by a full decode; of tars made by others, what their manifest has. Each problem is a line on stdout, and one
object in the file of `--json`; the exit code is 2 if there is any. `--repair` rewrites corrupt shards (see
`data_prep.repair`), but none that cannot be read or that holds samples which the manifest lacks.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

from data_prep.recover import Corruption, choose_source
from data_prep.repair import finish_repair, is_interrupted, repair
from data_prep.shards.problems import Problem, make_tasks, verify_shard
from data_prep.shards.timm_info import NAME, write_timm_info
from data_prep.workers import Progress, default_workers, run_tasks
from gcvit.data.manifest import COMPRESSED, FILE_NAME, Manifest, holds_shards, read_manifest
from gcvit.errors import UserError
from gcvit.runtime.command_line import check_at_least_one, command_parser
from gcvit.runtime.entrypoint import run_main

MAX_SHOWN = 20  # problems of one shard


def find_folders(out: Path) -> list[Path]:
    """Return `out` itself if it holds shards, else those of its folders that do.

    If tars in `out` have their manifests in folders below, these are returned.

    Raises:
        UserError: No folder holds shards.
    """
    folders = [path for path in sorted(out.iterdir()) if holds_shards(path)] if out.is_dir() else []
    are_below = not (out / FILE_NAME).exists() and any((folder / FILE_NAME).exists() for folder in folders)
    if holds_shards(out) and not are_below:
        return [out]
    if not folders:
        raise UserError("no shards here", got=out, expected="what data_prep.shard wrote", hint="check the path")
    return folders


def verify(manifest: Manifest, num_workers: int) -> list[Problem]:
    """Check one split, print its problems and return them."""
    folder = manifest.root
    tasks = make_tasks(manifest)
    progress = Progress(manifest.split, manifest.num_samples)
    names = {shard.name for shard in manifest.shards}
    strays = [name for name in sorted(os.listdir(folder)) if name.endswith((".tar", *COMPRESSED)) and name not in names]
    problems = [Problem(manifest.split, name, None, None, "is not in the manifest") for name in strays]
    print_problems(folder, problems)
    for number, found in run_tasks(verify_shard, tasks, num_workers):
        if found:
            progress.clear()
            print_problems(folder, found)
        problems += found
        progress.add(tasks[number].shard.num_samples, tasks[number].shard.num_bytes)
    progress.close()
    state = f"{len(problems)} problems" if problems else "all valid"
    print(
        f"{manifest.split}: {manifest.num_samples:,} samples of {len(manifest.classes):,} classes in "
        f"{len(manifest.shards):,} shards, {state}, {progress.seconds:.1f} s ({progress.rate}): {folder}",
        flush=True,
    )
    return problems


def print_problems(folder: Path, problems: list[Problem]) -> None:
    """Print the first `MAX_SHOWN` problems of a shard."""
    for problem in problems[:MAX_SHOWN]:
        print(f"{folder}/{problem}", flush=True)
    if len(problems) > MAX_SHOWN:
        print(f"{folder}/{problems[0].shard}: and {len(problems) - MAX_SHOWN} more; --json FILE lists all", flush=True)


def open_manifest(folder: Path, may_finish: bool) -> Manifest:
    """Read a manifest without checking its shards; finish an interrupted repair if `may_finish`.

    Raises:
        UserError: As of `read_manifest`; or a repair was interrupted and `may_finish` is False.
    """
    if is_interrupted(folder):
        if not may_finish:
            raise UserError("a repair was interrupted", got=folder, hint="start it again: --repair finishes it")
        finish_repair(folder)
        print(f"the interrupted repair is finished: {folder}")
    manifest = read_manifest(folder, check_shards=False)
    if outside := [shard.name for shard in manifest.shards if shard.name != os.path.basename(shard.name)]:
        raise UserError("a shard lies outside the manifest's folder", got=outside[0], expected=folder)
    return manifest


def refuse_unrepairable(problems: list[Problem]) -> None:
    """Check that a repair removes no valid sample.

    Raises:
        UserError: A problem is not repairable.
    """
    found = [problem for problem in problems if not problem.repairable]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise UserError(
            "a repair would remove samples that may be valid",
            got=f"{found[0]}{more}",
            expected="shards that can be read, and that hold no whole sample beyond their manifest's",
            hint="make the shard readable; where the manifest is stale, delete it and index the tars again (those of "
            "data_prep.shard: delete the shard, --repair --source writes it anew); nothing was changed",
        )


def repair_split(
    manifest: Manifest, problems: list[Problem], source: Path | None, classes: Path | None, num_workers: int
) -> int:
    """Repair the corrupt shards of a split.

    Returns:
        Number of problems that this removes: those of tars without a manifest stay.
    """
    names = {shard.name for shard in manifest.shards}
    problems = [problem for problem in problems if problem.shard in names]
    corruption: Corruption = {problem.shard: {} for problem in problems}
    for problem in problems:
        if problem.sample is not None:
            corruption[problem.shard][problem.sample] = problem.key
    if corruption:
        chosen = None if source is None else choose_source(manifest, source, classes)
        repair(manifest, corruption, chosen, num_workers)
    return len(problems)


def refresh_timm_info(out: Path) -> None:
    """Update timm's list of shards after a repair if it is ours; others' lists have fields of their own."""
    try:
        is_ours = json.loads((out / NAME).read_bytes()).keys() == {"splits"}
    except (OSError, ValueError, AttributeError):
        return
    if is_ours:
        write_timm_info(out)


HELP = """Check shards against their manifest, down to the last pixel.

    python -m data_prep.verify /data/imagenet-wds
    python -m data_prep.verify /data/imagenet-wds --repair --source /data/imagenet

A line for each problem; the exit code is 2 where there is one.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser("data_prep.verify", "DIR [flags]", HELP)
    add = parser.add_argument_group("what to check").add_argument
    add("out", metavar="DIR", type=Path, help="folder that data_prep.shard or data_prep.index wrote")
    add("--json", type=Path, metavar="FILE", help="write the problems there, as a list of objects")
    add("--workers", type=int, default=default_workers(), metavar="N", help="processes (%(default)s)")
    add = parser.add_argument_group("what to do about it").add_argument
    add("--repair", action="store_true", help="rewrite corrupt shards without the corrupt samples")
    add("--source", type=Path, metavar="SOURCE", help="... with their bytes from the source that was sharded")
    add("--classes", type=Path, metavar="FILE", help="... where it was sharded with --classes FILE")
    args = parser.parse_args(arguments)
    check_at_least_one(workers=args.workers)
    if args.source is not None and not args.repair:
        raise UserError("--source has no effect without --repair", got=args.source, hint="add --repair")
    if args.classes is not None and args.source is None:
        raise UserError("--classes has no effect without --source", got=args.classes, hint="add --source")
    manifests = [open_manifest(folder, args.repair) for folder in find_folders(args.out)]
    problems_of = [verify(manifest, args.workers) for manifest in manifests]
    problems = [problem for found in problems_of for problem in found]
    if args.json is not None:
        try:
            args.json.write_text(json.dumps([asdict(problem) for problem in problems], indent=1) + "\n")
        except OSError as error:
            raise UserError("cannot write the list of problems", got=f"{args.json} ({error.strerror})") from None
    num_left = len(problems)
    if args.repair:
        refuse_unrepairable(problems)
        for manifest, found in zip(manifests, problems_of, strict=True):
            num_left -= repair_split(manifest, found, args.source, args.classes, args.workers)
        refresh_timm_info(args.out)
    if num_left:
        raise UserError(
            "shards are corrupt" if not args.repair else "tars without a manifest are left as they are",
            got=f"{num_left} problems, listed above",
            hint="--repair rewrites them; or copy the shards named again, or delete the folder and shard again"
            if not args.repair
            else "move them away",
        )


if __name__ == "__main__":
    run_main(main)
