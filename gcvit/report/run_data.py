"""Read a run's folder for the report.

A folder may be of an older release, cut off, or still growing. Missing values are left empty, unreadable files are
named in `problems`, and each value is checked before it is used as a number.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import yaml

from gcvit.config.load import dump_yaml, parse_yaml
from gcvit.data.download import is_remote, redact
from gcvit.errors import UserError

Row = dict[str, Any]
Numbers = npt.NDArray[np.float64]
T = TypeVar("T")
VAL_PREFIX = "val/"


@dataclass(frozen=True)
class SampleGrid:
    """Augmented training images of one step: a picture of tiles, and their descriptions in reading order."""

    step: int
    picture: Path
    tiles: list[Row]


@dataclass(frozen=True)
class Record:
    """One run. Rows of `metrics.jsonl` are as written, in order."""

    name: str
    path: Path
    config_text: str
    config: Row
    rows: dict[str, list[Row]]
    """By kind."""
    evaluations: list[Row]
    """Of RUN/evaluations, the plain ones first, then by name; each has a "result"."""
    samples: list[SampleGrid]
    problems: list[str]
    """Sentences on what could not be read."""

    def of_kind(self, kind: str) -> list[Row]:
        return self.rows.get(kind, [])

    @property
    def start(self) -> Row:
        """Return the last start, or an empty row."""
        return (self.of_kind("start") or [{}])[-1]

    @property
    def batch_size(self) -> float | None:
        """Return the images of a step, over all devices."""
        return number(self.config.get("global_batch_size")) or number(self.start.get("global_batch_size"))

    @property
    def num_steps(self) -> int:
        """Return the number of finished steps, by the last row."""
        steps = [number(row.get("step")) for rows in self.rows.values() for row in rows]
        return int(max((step for step in steps if step is not None), default=0))


def read_record(path: Path, name: str | None = None) -> Record:
    """Read the run in `path` under a name.

    Raises:
        UserError: `path` is no run's folder.
    """
    if not (path / "metrics.jsonl").is_file() and not (path / "config.yaml").is_file():
        kind = "no folder" if not path.is_dir() else "a folder without metrics.jsonl and config.yaml"
        raise UserError(
            "no run here", got=f"{path} ({kind})", expected="a run's folder, runs/TAG", hint="check the path"
        )
    problems: list[str] = []

    def attempt(file: Path, read: Callable[[Path], T], otherwise: T) -> T:
        if not file.exists():
            return otherwise
        try:
            return read(file)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            problems.append(f"{file.relative_to(path)} could not be read ({_first_line(error)}).")
            return otherwise

    no_config: Row = {}
    no_rows: dict[str, list[Row]] = {}
    config = attempt(path / "config.yaml", _read_config, no_config)
    rows = attempt(path / "metrics.jsonl", lambda file: _read_rows(file, problems), no_rows)
    evaluations = [attempt(file, _read_evaluation, None) for file in sorted(path.glob("evaluations/*.json"))]
    grids = [attempt(file, _read_samples, None) for file in sorted(path.glob("samples/step_*.json"))]
    return Record(
        name=name or path.resolve().name,
        path=path,
        config_text=dump_yaml(config) if config else "",
        config=config,
        rows=rows,
        evaluations=sorted((found for found in evaluations if found is not None), key=_is_special),
        samples=sorted((grid for grid in grids if grid is not None), key=lambda grid: grid.step),
        problems=problems,
    )


def read_records(paths: Sequence[Path]) -> list[Record]:
    """Read several runs, named by the shortest ends of their paths that differ.

    Raises:
        UserError: A path is no run's folder, or is given twice.
    """
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise UserError("the same run twice", got=", ".join(map(str, paths)), hint="name each run once")
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return [read_record(path, "/".join(part[-length:])) for path, part in zip(paths, parts, strict=True)]


def _read_config(file: Path) -> Row:
    """Read the config, with the URL of its data without password and signature."""
    config = _mapping(parse_yaml(file.read_text()))
    data = config.get("data")
    if isinstance(data, dict) and isinstance(data.get("dir"), str) and is_remote(data["dir"]):
        data["dir"] = redact(data["dir"])
    return config


def _read_rows(file: Path, problems: list[str]) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = defaultdict(list)
    num_bad = 0
    with open(file, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = _mapping(json.loads(line))
            except ValueError:
                num_bad += 1
                continue
            rows[str(row.get("kind", "train"))].append(row)
    if num_bad:
        lines_are = "1 line of metrics.jsonl is" if num_bad == 1 else f"{num_bad} lines of metrics.jsonl are"
        problems.append(f"{lines_are} no JSON, and left out.")
    return dict(rows)


def _read_evaluation(file: Path) -> Row:
    evaluation = _mapping(json.loads(file.read_text()))
    _mapping(evaluation.get("result"))
    return {"name": file.stem} | evaluation


def _is_special(evaluation: Row) -> bool:
    """Return whether an evaluation is of ReaL, Sketch or the like; these are listed last."""
    return section(evaluation, "options").get("label_set") not in (None, "imagenet")


def _read_samples(file: Path) -> SampleGrid:
    tiles = json.loads(file.read_text())
    if not isinstance(tiles, list) or not tiles:
        raise ValueError("no list of tiles")
    return SampleGrid(
        int(file.stem.removeprefix("step_")), file.with_suffix(".png"), [_mapping(tile) for tile in tiles]
    )


def _mapping(value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} where a mapping should be")
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def number(value: Any) -> float | None:
    """Return a finite number as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of a thousand digits
        return None


def section(row: Row, key: str) -> Row:
    """Return a mapping inside of a row; an empty one if there is none."""
    value = row.get(key)
    return value if isinstance(value, dict) else {}


def rows_of(row: Row, key: str) -> list[Row]:
    """Return a list of mappings inside of a row, without other items."""
    value = row.get(key)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def column(rows: Sequence[Row], name: str) -> Numbers:
    """Return one value of each row, float64 (N,); NaN where there is no number."""
    values = (number(row.get(name)) for row in rows)
    return np.array([math.nan if value is None else value for value in values], np.float64)


def best_top1(record: Record) -> tuple[str, float, int] | None:
    """Find the best accuracy of the training as (weights, percent, step), of the EMA if there is one."""
    for weights in ("ema", "weights"):
        rows = [row for row in record.of_kind(VAL_PREFIX + weights) if number(row.get("top1")) is not None]
        if rows:
            best = max(rows, key=lambda row: float(row["top1"]))
            return weights, float(best["top1"]), int(number(best.get("step")) or 0)
    return None
