"""Records of evaluations: RUN/evaluations/NAME.json with all that repeats it, and a table of all.

NAME holds the set, the weights, their step or the beginning of their hash, and options other than the defaults: the
same call writes the same file.
"""

import csv
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

import gcvit
from gcvit.checkpoint.format import step_dir
from gcvit.checkpoint.weights_source import Candidate
from gcvit.data.download import is_remote, redact
from gcvit.errors import UserError
from gcvit.evaluation.label_sets import LABEL_SETS, ImageSet
from gcvit.evaluation.tta import Options
from gcvit.runtime.distributed import World

FOLDER = "evaluations"  # in a run's
TABLE_FILE = "results.csv"
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg")  # that numbers may depend on
_LINE = ("top1", "top5", "loss", "ece", "num_samples", "correct_top1", "correct_top5", "num_skipped")


def describe(
    one: ImageSet,
    weights: Candidate,
    options: Options,
    world: World,
    *,
    sha256: str,
    seconds: float,
    result: Mapping[str, Any],
) -> dict[str, Any]:
    """Describe an evaluation as plain values; `sha256` is of the weights. docs/evaluation.md lists the keys."""
    data = options.prepare(weights.data)
    return {
        "name": one.name,
        "weights": weights.weights,
        "checkpoint": {"path": weights.path, "step": weights.step, "sha256": sha256},
        "model": weights.model.model_dump(mode="json"),
        "data": {
            "dir": hide_secrets(one.dir),
            "split": one.split,
            "sha256": one.source.digest,
            "num_samples": one.source.num_samples,
        },
        "options": {
            "label_set": one.label_set,
            "img_size": list(options.sizes_of(weights.model)),
            "crop_pct": data.crop_pct,
            "resize": data.eval_resize,
            "tta": options.tta,
            "precision": options.precision,
            "batch_size": options.batch_size,
            "skip_corrupt": options.skip_corrupt,
            "exif_orientation": data.exif_orientation,
            "mean": list(data.mean),
            "std": list(data.std),
        },
        "command": shlex.join(map(hide_secrets, sys.argv)),
        "versions": {
            "gcvit": gcvit.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else world.device.type,
        "world_size": world.size,
        "time": time.time(),
        "seconds": seconds,
        "images_per_second": one.source.num_samples / seconds,
        "result": {key: None if is_nan(value) else value for key, value in result.items()},
    }


def is_nan(value: object) -> bool:
    """Return whether the loss is NaN, as of a model that has diverged; JSON has no NaN."""
    return isinstance(value, float) and not math.isfinite(value)


def hide_secrets(word: str) -> str:
    """Return a word of the command line without password and signature: a URL, SET=URL, or --flag=SET=URL."""
    if is_remote(word):
        return redact(word)
    name, mark, rest = word.partition("=")
    return f"{name}={hide_secrets(rest)}" if mark else word


def make_folder(out: str | None, run_dir: Path | None) -> Path | None:
    """Make the folder of records: `out`, or one in the run's. None, with a message, if there is neither.

    Raises:
        UserError: `out` cannot be written.
    """
    folder = Path(out) if out else run_dir and run_dir / FOLDER
    if not folder:
        print("no record is kept: these weights are in no run (--out DIR keeps one)", file=sys.stderr, flush=True)
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
        reason = "not writable"
    except OSError as error:
        reason = str(error.strerror)
    if out:
        raise UserError("cannot write to --out", got=f"{folder} ({reason})")
    print(f"no record is kept: {folder} ({reason}); --out DIR keeps it elsewhere", file=sys.stderr, flush=True)
    return None


def keep(folder: Path, record: Mapping[str, Any], tags: Sequence[str]) -> None:
    """Write a record, and the table of all records of the folder, each atomically.

    It replaces a record of the same weights, data and options, but no other record with the same name.

    Raises:
        UserError: The folder cannot be written, or holds another record with this name.
    """
    step, sha256 = record["checkpoint"]["step"], record["checkpoint"]["sha256"]
    words = [record["name"], record["weights"], sha256[:8] if step is None else step_dir(step), *tags]
    name = re.sub(r"[^A-Za-z0-9_.+-]", "_", "-".join(words))
    identity = _identify(record)
    try:
        there = _read(folder / f"{name}.json")
        if there and _identify(there) != identity:
            name += f"-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        _replace(folder / f"{name}.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
        part = folder / f"{TABLE_FILE}.{os.getpid()}.tmp"
        with open(part, "w", newline="", encoding="utf-8") as file:
            rows = [_as_row(path.name, found) for path in sorted(folder.glob("*.json")) if (found := _read(path))]
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        part.replace(folder / TABLE_FILE)
    except OSError as error:
        raise UserError("cannot keep the evaluation", got=f"{folder} ({error.strerror})") from None


def as_line(record: Mapping[str, Any]) -> str:
    """Format a record as the printed line, which is equal for equal inputs."""
    found = {key: record["result"][key] for key in _LINE}
    return json.dumps({"name": record["name"], "weights": record["weights"], **found}, allow_nan=False)


def as_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Format records as a table: accuracies in percent, images per second of all processes."""
    head = ("set", "weights", "top-1", "top-5", "loss", "ECE", "images", "img/s")
    rows = [head, *(_cells(record) for record in records)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        named, counted = zip(row[:2], widths[:2], strict=True), zip(row[2:], widths[2:], strict=True)
        cells = [cell.ljust(width) for cell, width in named] + [cell.rjust(width) for cell, width in counted]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _cells(record: Mapping[str, Any]) -> tuple[str, ...]:
    found = record["result"]
    loss = "–" if found["loss"] is None else f"{found['loss']:.4f}"
    known = LABEL_SETS[record["options"]["label_set"]].num_samples if record["options"]["label_set"] else None
    num = record["data"]["num_samples"]
    return (
        record["name"],
        record["weights"],
        f"{found['top1']:.3f}",
        f"{found['top5']:.3f}",
        loss,
        f"{found['ece']:.4f}",
        f"{found['num_samples']}" + (f" (of {known})" if known not in (None, num) else ""),
        f"{record['images_per_second']:.1f}",
    )


def _read(path: Path) -> dict[str, Any] | None:
    """Read the record in a file; None if there is none."""
    try:
        record = json.loads(path.read_text())
        _as_row(path.name, record)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return cast(dict[str, Any], record)


def _identify(record: Mapping[str, Any]) -> str:
    """Identify an evaluation: the same text for the same weights, data and options."""
    return json.dumps([record["checkpoint"]["sha256"], record["data"]["sha256"], record["options"]])


def _as_row(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record in the file `name` as a row of the table."""
    of = {"checkpoint": record["checkpoint"], "data": record["data"]}
    return {
        "file": name,
        "set": record["name"],
        "weights": record["weights"],
        **{key: record["result"][key] for key in _LINE},
        **{f"{part}_{key}": value for part, values in of.items() for key, value in values.items()},
        **{key: record[key] for key in ("images_per_second", "seconds", "world_size", "device", "time", "command")},
        "options": json.dumps(record["options"]),
        "versions": json.dumps(record["versions"]),
    }


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    part.write_text(text)
    part.replace(path)
