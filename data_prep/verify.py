"""Check shards against their manifest, to the last pixel: `python -m data_prep.verify OUT`.

Hashes of shards and columns, the members' order and number, labels in .cls and .json, checksums, and a full
decode of every image; of tars that others made, what their manifest knows. One line per problem on stdout, all of
them in the file that `--json` names; exit code 2 where there is any. `--repair` rewrites the shards that are corrupt
(see `data_prep.repair`), but none that cannot be read or that holds samples which the manifest lacks.
"""

import hashlib
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32
from PIL import Image

from data_prep.recover import Corruption, choose_source
from data_prep.repair import finish_repair, is_interrupted, repair
from data_prep.shards.samples import MAX_LABELS, Contents, read_label
from data_prep.shards.tar_reader import TarReader
from data_prep.shards.timm_info import NAME, write_timm_info
from data_prep.workers import Progress, default_workers, run_tasks
from gcvit.data.image_files import FORMATS, MAX_PIXELS
from gcvit.data.manifest import COMPRESSED, FILE_NAME, Manifest, Shard, holds_shards, read_manifest
from gcvit.errors import UserError
from gcvit.runtime.command_line import check_at_least_one, command_parser
from gcvit.runtime.entrypoint import run_main

MAX_SHOWN = 20  # problems of one shard
OURS = {"key", "path", "class", "label"}  # what stands in a .json that data_prep.shard wrote


@dataclass(frozen=True)
class Task:
    """One shard with its part of the columns, each [num_samples of the shard]; `first` numbers its first sample.

    `usual` are the fields that every sample has: where a tar lost a member, that tells which sample did.
    """

    folder: Path
    split: str
    shard: Shard
    classes: tuple[str, ...]
    usual: frozenset[str]
    first: int
    offset: np.ndarray
    length: np.ndarray
    label: np.ndarray
    crc32: np.ndarray | None


@dataclass(frozen=True)
class Problem:
    """What is wrong with a shard, or with the sample of this number in its split; `key` None where it is lost.

    One that is not `repairable` is no corruption to the shard's bytes, or none that is known: its samples may be sound.
    """

    split: str
    shard: str
    sample: int | None
    key: str | None
    problem: str
    repairable: bool = True

    def __str__(self) -> str:
        name = self.key or (None if self.sample is None else f"sample {self.sample}")
        return f"{self.shard}: {self.problem}" if name is None else f"{self.shard}: {name}: {self.problem}"


def find_folders(out: Path) -> list[Path]:
    """`out` itself where it holds shards, else those of its folders that do. Errors: UserError for none.

    Where tars in `out` have their manifests in folders below, it is these.
    """
    folders = [path for path in sorted(out.iterdir()) if holds_shards(path)] if out.is_dir() else []
    are_below = not (out / FILE_NAME).exists() and any((folder / FILE_NAME).exists() for folder in folders)
    if holds_shards(out) and not are_below:
        return [out]
    if not folders:
        raise UserError("no shards here", got=out, expected="what data_prep.shard wrote", hint="check the path")
    return folders


def usual_fields(manifest: Manifest) -> frozenset[str]:
    """The fields that all samples of a few shards have: of sound ones where there are such."""
    sound: list[frozenset[str]] = []
    corrupt: list[frozenset[str]] = []
    for number in range(0, len(manifest.shards), 1 + len(manifest.shards) // 4):
        shard = manifest.shards[number]
        try:
            with TarReader(manifest.root / shard.name) as tar:
                contents = Contents(tar)
                is_sound = not contents.broken and tar.num_bytes == shard.num_bytes
        except OSError:
            continue
        offset = manifest.offset[manifest.first[number] : manifest.first[number + 1]]
        fields = _common_fields(contents, offset, is_sound)
        if fields is not None:
            (sound if is_sound else corrupt).append(fields)
    found = sound or corrupt
    return frozenset.intersection(*found) if found else frozenset()


def _common_fields(contents: Contents, offset: np.ndarray, is_sound: bool) -> frozenset[str] | None:
    """Return the fields that all samples have (of a corrupt tar: all samples not beside corruption), or None."""
    keys = [contents.key_at.get(int(place)) for place in offset]
    if not is_sound:  # nor may the next image be lost: what lay between may have been cut out
        pairs = zip(keys, [*keys[1:], None], strict=True)
        keys = [key for key, behind in pairs if behind is not None and key not in contents.beside]
    fields = [frozenset(contents.fields[key]) for key in keys if key is not None]
    return frozenset.intersection(*fields) if fields else None


def tasks_of(manifest: Manifest) -> list[Task]:
    tasks = []
    usual = usual_fields(manifest)
    for shard, begin, end in zip(manifest.shards, manifest.first[:-1], manifest.first[1:], strict=True):
        offset, length, label = (
            np.array(column[begin:end]) for column in (manifest.offset, manifest.length, manifest.label)
        )
        crc32 = None if manifest.crc32 is None else np.array(manifest.crc32[begin:end])
        about = (manifest.root, manifest.split, shard, manifest.classes, usual, int(begin))
        tasks.append(Task(*about, offset, length, label, crc32))
    return tasks


def verify_shard(task: Task) -> list[Problem]:
    """The problems of one shard: those of the tar, then those of its samples in their order."""

    def problem(text: str, sample: int | None = None, key: str | None = None, repairable: bool = True) -> Problem:
        return Problem(task.split, task.shard.name, sample, key, text, repairable)

    path = task.folder / task.shard.name
    numbers = range(task.first, task.first + task.shard.num_samples)
    try:
        found = []
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with TarReader(path) as tar:
            if tar.num_bytes != task.shard.num_bytes:
                kind = "truncated" if tar.num_bytes < task.shard.num_bytes else "grown"
                found.append(problem(f"is {kind}: {tar.num_bytes} bytes instead of {task.shard.num_bytes}"))
            elif task.shard.sha256 not in (None, sha256):
                found.append(problem(f"SHA-256 is {sha256} instead of {task.shard.sha256}"))
            if np.any(np.diff(task.offset) <= 0):
                are_distinct = len(np.unique(task.offset)) == len(task.offset)
                found.append(problem("the manifest lists its samples out of order", repairable=are_distinct))
            contents = Contents(tar)
            usual: frozenset[str] = frozenset()
            if contents.broken or tar.num_bytes != task.shard.num_bytes:
                here = _common_fields(contents, task.offset, is_sound=False)
                usual = task.usual if here is None else task.usual & here
            label_of = {name: label for label, name in enumerate(task.classes)}
            found += [problem(f"{error} at byte {error.position}") for error in contents.broken]
            lost_sizes: Counter[int] = Counter()
            for index, sample in enumerate(numbers):
                key = contents.key_at.get(int(task.offset[index]))
                lost_sizes[int(task.length[index])] += key is None
                texts = _verify_sample(task, index, key, contents, usual, label_of)
                found += [problem(text, sample, key) for text in texts]
            for key in _find_surplus(task, contents, label_of):
                # One as large as a lost one is that one, moved by what was cut out or put in before it.
                size = contents.fields[key]["image"].size
                is_moved = lost_sizes[size] > 0
                lost_sizes[size] -= is_moved
                found.append(problem("the manifest lacks this sample", key=key, repairable=is_moved))
        return found
    except OSError as error:
        text = f"cannot be read: {error.strerror}"
        # Only a file that is gone is lost. Others may be sound: on a disk that is away, or another user's.
        if not isinstance(error, FileNotFoundError) or path.is_symlink():
            return [problem(text, repairable=False)]
        return [problem(text), *(problem("cannot be read", sample) for sample in numbers)]


def _verify_sample(
    task: Task, index: int, key: str | None, contents: Contents, usual: frozenset[str], label_of: Mapping[str, int]
) -> list[str]:
    offset, length, expected = (int(column[index]) for column in (task.offset, task.length, task.label))
    if key is None:
        return [f"lost: no image lies at byte {offset}"]
    problems = []
    fields = contents.fields[key]
    if key in contents.twice:
        problems.append("two members have one name")
    if missing := usual - fields.keys():
        problems.append(f"lost: its {', '.join(sorted(missing))}")
    if fields["image"].size != length:
        problems.append(f"has {fields['image'].size} bytes; the manifest says {length}")
    data = contents.tar.read(offset, length)
    if task.crc32 is not None and crc32(data) != task.crc32[index]:
        problems.append(f"crc32 is {crc32(data):08x}; the manifest says {int(task.crc32[index]):08x}")
    problems += _verify_label(task.classes, expected, key, contents, label_of)
    try:
        decode(data)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever they meet in corrupt bytes
        problems.append(f"does not decode: {error}")
    return problems


def _verify_label(
    classes: tuple[str, ...], expected: int, key: str, contents: Contents, label_of: Mapping[str, int]
) -> list[str]:
    problems = []
    cls, about = contents.read(key, "cls"), contents.read(key, "json")
    try:
        if (label := read_label(cls, about, label_of)) != expected:
            problems.append(f"{'.json' if cls is None else '.cls'} says {label}; the manifest says {expected}")
    except ValueError as error:
        problems.append(str(error))
    try:
        said = {} if about is None else json.loads(about)
    except (ValueError, RecursionError):
        return [*problems, ".json cannot be read"]
    if isinstance(said, dict) and said.keys() >= OURS:
        name = classes[expected] if 0 <= expected < len(classes) else None
        if name == f"{expected:04d}":  # index knew no names
            name = said["class"]
        wanted = (key, expected, name)
        if (found := (said["key"], said["label"], said["class"])) != wanted:
            problems.append(f".json says {found}; name and manifest say {wanted}")
    return problems


def _find_surplus(task: Task, contents: Contents, label_of: Mapping[str, int]) -> list[str]:
    """Keys of samples that are whole and yet not in the manifest."""
    known = {contents.key_at.get(int(offset)) for offset in task.offset}
    surplus = []
    for key, fields in contents.fields.items():
        if key not in known and key not in contents.twice and "image" in fields and fields["image"].size:
            try:
                label = read_label(contents.read(key, "cls"), contents.read(key, "json"), label_of)
            except ValueError:
                continue
            surplus += [key] if label < MAX_LABELS else []
    return surplus


def decode(data: bytes) -> None:
    """Decode an image to its last pixel. Errors: whatever Pillow meets in corrupt bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        with Image.open(io.BytesIO(data), formats=[*FORMATS, "PPM"]) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"announces {picture.width} x {picture.height} pixels")
            picture.load()


def verify(manifest: Manifest, num_workers: int) -> list[Problem]:
    """Check one split, print its problems and return them."""
    folder = manifest.root
    tasks = tasks_of(manifest)
    progress = Progress(manifest.split, manifest.num_samples)
    names = {shard.name for shard in manifest.shards}
    strays = [name for name in sorted(os.listdir(folder)) if name.endswith((".tar", *COMPRESSED)) and name not in names]
    problems = [Problem(manifest.split, name, None, None, "is not in the manifest") for name in strays]
    show(folder, problems)
    for number, found in run_tasks(verify_shard, tasks, num_workers):
        if found:
            progress.clear()
            show(folder, found)
        problems += found
        progress.add(tasks[number].shard.num_samples, tasks[number].shard.num_bytes)
    progress.close()
    state = f"{len(problems)} problems" if problems else "all sound"
    print(
        f"{manifest.split}: {manifest.num_samples:,} samples of {len(manifest.classes):,} classes in "
        f"{len(manifest.shards):,} shards, {state}, {progress.seconds:.1f} s ({progress.rate}): {folder}",
        flush=True,
    )
    return problems


def show(folder: Path, problems: list[Problem]) -> None:
    for problem in problems[:MAX_SHOWN]:
        print(f"{folder}/{problem}", flush=True)
    if len(problems) > MAX_SHOWN:
        print(f"{folder}/{problems[0].shard}: and {len(problems) - MAX_SHOWN} more; --json FILE lists all", flush=True)


def open_manifest(folder: Path, may_finish: bool) -> Manifest:
    """The manifest, whatever its shards are like. Errors: UserError as of `read_manifest`, for an unfinished repair."""
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
    """Errors: UserError where a repair would remove what may be sound."""
    found = [problem for problem in problems if not problem.repairable]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise UserError(
            "a repair would remove what may be sound",
            got=f"{found[0]}{more}",
            expected="shards that can be read, and that hold no whole sample beyond their manifest's",
            hint="make the shard readable; where the manifest is stale, delete it and index the tars again (those of "
            "data_prep.shard: delete the shard, --repair --source writes it anew); nothing was changed",
        )


def repair_split(
    manifest: Manifest, problems: list[Problem], source: Path | None, classes: Path | None, num_workers: int
) -> int:
    """Repair what is corrupt, and return how many of the problems that mends: not those of tars without a manifest."""
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
    """Let timm's list of shards follow a repair where it is ours; that of others says more than we know."""
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
    add("--source", type=Path, metavar="SOURCE", help="... with them, taken again from what was sharded")
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
