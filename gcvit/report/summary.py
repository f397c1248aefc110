"""The head of a run: a sentence and a few figures."""

import math
from dataclasses import dataclass

import numpy as np

from gcvit.report.formatting import count, duration, gigabytes, moment, percent, plain, plural, short
from gcvit.report.run_data import Record, best_top1, column, number, section


@dataclass(frozen=True)
class Summary:
    """The head of a run: a sentence, and its figures as (name, value, note)."""

    name: str
    color: str
    sentence: str
    tiles: list[tuple[str, str, str]]
    problems: list[str]


def summarize(record: Record, color: str) -> Summary:
    """Summarize a run; `color` is the palette name of its colour."""
    if not record.rows:
        return Summary(record.name, color, "The run has no rows yet.", [], record.problems)
    start, model = record.start, section(record.config, "model")
    size = f" at {model['img_size']} × {model['img_size']}" if number(model.get("img_size")) else ""
    of = f" of {count(record.batch_size)} images" if record.batch_size else ""
    where = f" on {count(number(start.get('num_devices')))} × {start.get('device')}" if start else ""
    engine = f", by {record.config['engine']}" if isinstance(record.config.get("engine"), str) else ""
    steps = f"{plural(record.num_steps, 'step')}{of}{engine}{where}"
    sentence = f"{model.get('name', 'A model')}{size}: {steps}. {_describe_end(record)}"
    return Summary(record.name, color, sentence, _list_tiles(record), record.problems)


def _list_tiles(record: Record) -> list[tuple[str, str, str]]:
    start, train = record.start, record.of_kind("train")
    tiles = []
    if best := best_top1(record):
        weights, top1, step = best
        which = "EMA" if weights == "ema" else "raw weights"
        tiles.append(("best top-1", percent(top1), f"{which}, step {count(step)}"))
    losses, speeds, speeds_each, seconds, memory = (
        column(train, name)
        for name in ("loss", "images_per_second", "images_per_second_per_device", "seconds", "memory_bytes")
    )
    if np.isfinite(losses).any():
        tiles.append(("last loss", plain(float(losses[np.isfinite(losses)][-1])), "on training batches"))
    if (speeds > 0).any():
        each = f"; {short(float(np.median(speeds_each[speeds_each > 0])))} a device" if (speeds_each > 0).any() else ""
        tiles.append(("throughput", f"{short(float(np.median(speeds[speeds > 0])))}\u202fimg/s", f"median{each}"))
    if (seconds > 0).any():
        total = float(seconds[seconds > 0].sum())
        tiles.append(("training time", duration(total), "without evaluations and checkpoints"))
    if parameters := number(start.get("parameters")):
        flops = number(start.get("train_flops_per_image"))
        tiles.append(("parameters", short(parameters), f"{flops / 6e9:.3g} GMAC an image" if flops else ""))
    if (memory > 0).any():
        tiles.append(("peak memory", gigabytes(float(memory[memory > 0].max())), "of the fullest process"))
    return tiles


def _describe_end(record: Record) -> str:
    # A run that was restarted after an end continues.
    last_start = number(record.start.get("time")) or 0.0
    ends = [row for row in record.of_kind("end") if (number(row.get("time")) or math.inf) >= last_start]
    outcome = ends[-1].get("outcome") if ends else None
    restarts = len(record.of_kind("start")) - 1
    again = f" It was started {count(restarts + 1)} times." if restarts > 0 else ""
    if outcome == "finished":
        return f"It finished.{again}"
    if outcome == "preempted":
        return f"It was preempted, saved a checkpoint, and waits for a restart.{again}"
    times = [time for rows in record.rows.values() for row in rows if (time := number(row.get("time"))) is not None]
    last = f" Its last row is of {moment(max(times))}." if times else ""
    return f"No row marks its end: it is still running, was stopped, or is of an older release.{last}{again}"
