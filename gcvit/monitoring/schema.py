"""The rows of a run's `metrics.jsonl`: a dataclass for each kind, and a check of a row. In words: docs/metrics.md.

Each row is one line of strict JSON with "step" (finished steps), "kind", "time" (Unix seconds) and its dataclass's
fields. A number that is not finite, such as the loss of steps that were all refused, is null.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

STAGES = ("storage", "decoding", "augmentation", "collation", "copy", "compute", "communication", "checkpoint")
"""The values of `bound_by`, and the keys of `stages`: seconds a step on the slowest rank."""


class Row:
    """Base of the kinds. A field with a default is left out of the file if it is None."""

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON stores it: null for numbers that are not finite."""
        fields = {field.name: field for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in vars(self).items()
            if value is not None or fields[name].default is dataclasses.MISSING
        }


@dataclass(frozen=True)
class StartRow(Row):
    """A start or resume."""

    world_size: int
    hosts: list[str]
    device: str
    num_devices: int
    engine: str
    precision: str
    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    versions: dict[str, str]
    commit: str | None
    parameters: int
    train_flops_per_image: int
    peak_flops: float | None
    samples: int


@dataclass(frozen=True)
class TrainRow(Row):
    """A logging step, over the steps since the last one."""

    loss: float | None
    train_top1: float | None
    lr: float
    grad_norm: float | None
    refused_steps: int
    images_per_second: float
    images_per_second_per_device: float
    mfu: float | None
    memory_bytes: int
    seconds: float
    seconds_left: float
    num_corrupt: int
    data_wait: float
    bound_by: str
    bound_share: float
    slowest_rank: int
    stages: dict[str, float]


@dataclass(frozen=True)
class EvaluationRow(Row):
    """An evaluation of the weights or of their EMA."""

    top1: float
    top5: float
    loss: float | None
    num_samples: int
    correct_top1: int
    num_skipped: int
    seconds: float


@dataclass(frozen=True)
class CheckpointRow(Row):
    """A complete checkpoint."""

    stall_seconds: float
    write_seconds: float
    bytes: int


@dataclass(frozen=True)
class BadStepRow(Row):
    """A refused update; `rank` is None where no rank's own samples caused it."""

    rank: int | None
    what: str
    samples: list[str]
    num_samples: int


@dataclass(frozen=True)
class CorruptionRow(Row):
    """A corrupt sample that was replaced."""

    sample: int
    where: str
    reason: str
    num_corrupt: int


@dataclass(frozen=True)
class EndRow(Row):
    """An end but a crash."""

    outcome: str
    samples: int
    best_top1: float | None = None


KINDS: dict[str, type[Row]] = {
    "start": StartRow,
    "train": TrainRow,
    "val/weights": EvaluationRow,
    "val/ema": EvaluationRow,
    "checkpoint": CheckpointRow,
    "bad_step": BadStepRow,
    "corruption": CorruptionRow,
    "end": EndRow,
}
TIMED_KEYS = (
    *("time", "images_per_second", "images_per_second_per_device", "mfu", "memory_bytes", "seconds", "seconds_left"),
    *("data_wait", "bound_by", "bound_share", "slowest_rank", "stages"),
)
"""The keys whose values differ between two runs of equal numbers."""


def types_of(kind: str) -> dict[str, tuple[type, ...]]:
    """Return the types that JSON may hold by key: of a float also int, of an optional also None."""
    hints = {"step": int, "kind": str, "time": float, **typing.get_type_hints(KINDS[kind])}
    return {name: _json_types(hint) for name, hint in hints.items()}


def optional_keys(kind: str) -> set[str]:
    """Return the keys that a row may lack."""
    fields = dataclasses.fields(KINDS[kind])  # type: ignore[arg-type]
    return {field.name for field in fields if field.default is not dataclasses.MISSING}


def find_faults(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each fault of a row; nothing if the row is valid."""
    kind = row.get("kind")
    if kind not in KINDS:
        yield f"kind: {kind!r} is none of {', '.join(KINDS)}"
        return
    expected, optional = types_of(kind), optional_keys(kind)
    yield from (f"{kind}: {key} is missing" for key in expected if key not in row and key not in optional)
    for key, value in row.items():
        if key not in expected:
            yield f"{kind}: {key} is unknown"
        elif isinstance(value, bool) or not isinstance(value, expected[key]) or (value is None and key in optional):
            yield f"{kind}: {key} is {value!r}"
    if kind == "train" and isinstance(row.get("stages"), dict):
        if tuple(row["stages"]) != STAGES:
            yield f"train: stages are {', '.join(row['stages'])}"
        if row.get("bound_by") not in STAGES:
            yield f"train: bound_by is {row.get('bound_by')!r}"


def _json_types(hint: Any) -> tuple[type, ...]:
    if isinstance(hint, types.UnionType):
        return tuple(found for part in typing.get_args(hint) for found in _json_types(part))
    return (float, int) if hint is float else (typing.get_origin(hint) or hint,)
