"""Check shards against their manifest, to the last pixel: `python -m data_prep.verify OUT`.

Hashes of shards and columns, the members' order and number, labels in .cls and .json, checksums, and a full
decode of every image. One line per problem on stdout; exit code 2 where there is any.
"""

import argparse
import hashlib
import io
import json
import os
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.pool import Progress, default_workers, run_tasks
from data_prep.sources import EXTENSIONS, OPENERS
from gcvit.data.manifest import Manifest, Shard, holds_shards, read_manifest
from gcvit.errors import UserError, run_main


@dataclass(frozen=True)
class Task:
    """One shard with its part of the columns, each [num_samples of the shard]."""

    folder: Path
    shard: Shard
    classes: tuple[str, ...]
    offset: np.ndarray
    length: np.ndarray
    label: np.ndarray
    crc32: np.ndarray


def find_folders(out: Path) -> list[Path]:
    """`out` itself where it holds shards, else those of its folders that do. Errors: UserError for none."""
    if holds_shards(out):
        return [out]
    folders = [path for path in sorted(out.iterdir()) if holds_shards(path)] if out.is_dir() else []
    if not folders:
        raise UserError("no shards here", got=out, allowed="a folder that data_prep.shard wrote", cure="check the path")
    return folders


def tasks_of(manifest: Manifest) -> list[Task]:
    columns = (manifest.offset, manifest.length, manifest.label, manifest.crc32)
    return [
        Task(manifest.root, shard, manifest.classes, *(np.array(column[begin:end]) for column in columns))
        for shard, begin, end in zip(manifest.shards, manifest.first[:-1], manifest.first[1:], strict=True)
    ]


def verify_shard(task: Task) -> list[str]:
    """The problems of one shard, a line each: "train-000000.tar: a/1.jpg: crc32 ..."."""
    problems = []
    path = task.folder / task.shard.name
    num_seen = 0
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 != task.shard.sha256:
                problems.append(f"SHA-256 is {sha256} instead of {task.shard.sha256}")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = iter(tar)
                for index, image in enumerate(members):
                    num_seen += 1
                    if index >= task.shard.num_samples:
                        problems.append(f"{image.name}: the manifest ends before this sample")
                        break
                    sample = (image, next(members, None), next(members, None))
                    found = _verify_sample(task, index, tar, *sample)
                    problems += [f"{image.name}: {text}" for text in found]
    except (OSError, tarfile.TarError) as error:
        problems.append(f"cannot be read on after {num_seen} samples: {error}")
    if num_seen < task.shard.num_samples:
        problems.append(f"ends after {num_seen} samples instead of {task.shard.num_samples}")
    return [f"{path}: {problem}" for problem in problems]


def _verify_sample(
    task: Task,
    index: int,
    tar: tarfile.TarFile,
    image: tarfile.TarInfo,
    label: tarfile.TarInfo | None,
    about: tarfile.TarInfo | None,
) -> list[str]:
    key, extension = os.path.splitext(image.name)
    names = [image.name, label and label.name, about and about.name]
    if extension[1:] not in EXTENSIONS.values() or names[1:] != [f"{key}.cls", f"{key}.json"]:
        return [f"members are {names}, not KEY.jpg (or its like), KEY.cls, KEY.json"]
    assert label is not None  # both have the right name
    assert about is not None
    problems = []
    expected = int(task.label[index])
    place = (int(task.offset[index]), int(task.length[index]))
    if (image.offset_data, image.size) != place:
        problems.append(f"lies at {image.offset_data} with {image.size} bytes; the manifest says {place}")
    data, label_text, about_text = (_read(tar, member) for member in (image, label, about))
    if zlib.crc32(data) != task.crc32[index]:
        problems.append(f"crc32 is {zlib.crc32(data):08x}; the manifest says {int(task.crc32[index]):08x}")
    if label_text != str(expected).encode():
        problems.append(f".cls says {label_text[:20]!r}; the manifest says {expected}")
    try:
        said = json.loads(about_text)
        found = (said["key"], said["label"], said["class"])
    except (ValueError, LookupError, TypeError) as error:
        problems.append(f".json cannot be read: {error!r}")
    else:
        wanted = (key, expected, task.classes[expected] if 0 <= expected < len(task.classes) else None)
        if found != wanted:
            problems.append(f".json says {found}; name and manifest say {wanted}")
    try:
        with Image.open(io.BytesIO(data), formats=OPENERS) as picture:
            picture.load()
    except Exception as error:  # Pillow's plugins raise whatever they meet in damaged bytes
        problems.append(f"does not decode: {error}")
    return problems


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise tarfile.ReadError(f"{member.name} is no regular file")
    return file.read()


def verify(folder: Path, num_workers: int) -> int:
    """Check one split, print its problems, return their number. Errors: UserError as of `read_manifest`."""
    manifest = read_manifest(folder)
    tasks = tasks_of(manifest)
    progress = Progress(manifest.split, manifest.num_samples)
    num_problems = 0
    for number, problems in run_tasks(verify_shard, tasks, num_workers):
        if problems:
            progress.close()
            print("\n".join(problems), flush=True)
        num_problems += len(problems)
        progress.add(tasks[number].shard.num_samples, tasks[number].shard.num_bytes)
    progress.close()
    state = f"{num_problems} problems" if num_problems else "all sound"
    print(
        f"{manifest.split}: {manifest.num_samples:,} samples of {len(manifest.classes):,} classes in "
        f"{len(manifest.shards):,} shards, {state}, {progress.seconds:.1f} s ({progress.rate}): {folder}",
        flush=True,
    )
    return num_problems


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.verify",
        description="Check shards against their manifest, and decode every image.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="folder that data_prep.shard wrote")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        raise UserError("--workers is too small", got=args.workers, allowed="at least 1")
    num_problems = sum(verify(folder, args.workers) for folder in find_folders(args.out))
    if num_problems:
        raise UserError(
            "shards are damaged",
            got=f"{num_problems} problems, listed above",
            cure="copy the shards named again, or delete the folder and shard the source again",
        )


if __name__ == "__main__":
    run_main(main)
