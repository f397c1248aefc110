"""The rows of a run's `metrics.jsonl`: what each kind holds, and a check. In words: docs/metrics.md.

Strict JSON, one row a line. Each has "step" (finished steps), "kind" and "time" (Unix seconds). What is not finite, as
the loss of steps that were all refused, is null.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_NUMBER, _COUNT, _TEXT = (int, float), (int,), (str,)
_NULL = (type(None),)
_EVALUATION = {
    "top1": _NUMBER,
    "top5": _NUMBER,
    "loss": _NUMBER + _NULL,
    "num_samples": _COUNT,
    "correct_top1": _COUNT,
    "num_skipped": _COUNT,
    "seconds": _NUMBER,
}
KINDS: dict[str, dict[str, tuple[type, ...]]] = {
    "start": {
        "world_size": _COUNT,
        "hosts": (list,),
        "device": _TEXT,
        "num_devices": _COUNT,
        "engine": _TEXT,
        "precision": _TEXT,
        "global_batch_size": _COUNT,
        "micro_batch_size": _COUNT,
        "accumulation": _COUNT,
        "versions": (dict,),
        "commit": _TEXT + _NULL,
        "parameters": _COUNT,
        "train_flops_per_image": _COUNT,
        "peak_flops": _NUMBER + _NULL,
        "samples": _COUNT,
    },
    "train": {
        "loss": _NUMBER + _NULL,
        "train_top1": _NUMBER + _NULL,
        "lr": _NUMBER,
        "grad_norm": _NUMBER + _NULL,
        "refused_steps": _COUNT,
        "images_per_second": _NUMBER,
        "images_per_second_per_device": _NUMBER,
        "mfu": _NUMBER + _NULL,
        "memory_bytes": _COUNT,
        "seconds": _NUMBER,
        "seconds_left": _NUMBER,
        "num_corrupt": _COUNT,
        "data_wait": _NUMBER,
        "bound_by": _TEXT,
        "bound_share": _NUMBER,
        "slowest_rank": _COUNT,
        "stages": (dict,),
    },
    "val/weights": _EVALUATION,
    "val/ema": _EVALUATION,
    "checkpoint": {"stall_seconds": _NUMBER, "write_seconds": _NUMBER, "bytes": _COUNT},
    "bad_step": {"rank": _COUNT + _NULL, "what": _TEXT, "samples": (list,), "num_samples": _COUNT},
    "corruption": {"sample": _COUNT, "where": _TEXT, "reason": _TEXT, "num_corrupt": _COUNT},
    "end": {"outcome": _TEXT, "samples": _COUNT},
}
"""Keys that a kind must have, with the types of their values."""
OPTIONAL: dict[str, dict[str, tuple[type, ...]]] = {"end": {"best_top1": _NUMBER}}
STAGES = ("storage", "decoding", "augmentation", "collation", "copy", "compute", "communication", "checkpoint")
"""What `bound_by` may be, and the keys of `stages`: seconds a step on the slowest rank."""
TIMED_KEYS = (
    *("time", "images_per_second", "images_per_second_per_device", "mfu", "memory_bytes", "seconds", "seconds_left"),
    *("data_wait", "bound_by", "bound_share", "slowest_rank", "stages"),
)
"""What differs between two runs of the same numbers."""


def find_faults(row: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a row, in words; nothing for a sound one."""
    kind = row.get("kind")
    if kind not in KINDS:
        yield f"kind: {kind!r} is none of {', '.join(KINDS)}"
        return
    wanted = {"step": _COUNT, "kind": _TEXT, "time": _NUMBER, **KINDS[kind]}
    allowed = wanted | OPTIONAL.get(kind, {})
    yield from (f"{kind}: {key} is missing" for key in wanted if key not in row)
    for key, value in row.items():
        if key not in allowed:
            yield f"{kind}: {key} is unknown"
        elif isinstance(value, bool) or not isinstance(value, allowed[key]):
            yield f"{kind}: {key} is {value!r}"
    if kind == "train" and isinstance(row.get("stages"), dict):
        if tuple(row["stages"]) != STAGES:
            yield f"train: stages are {', '.join(row['stages'])}"
        if row.get("bound_by") not in STAGES:
            yield f"train: bound_by is {row.get('bound_by')!r}"
