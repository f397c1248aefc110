"""The time line: steps over time, with restarts, checkpoints, refused updates and corrupt images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from gcvit.report.charts import MAX_POINTS, Chart, KeyItem, as_list, new_figure, safe, tone
from gcvit.report.formatting import count, duration, gigabytes, listing, moment, plural
from gcvit.report.run_data import Numbers, Record, Row, column, number
from gcvit.report.training import run_color

_MAX_MARKS = 400  # of a kind and a run; more would merge into a bar
_UNITS = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (300, 60, "minutes"), (0, 1, "seconds"))


@dataclass(frozen=True)
class Mark:
    """A kind of event: its words, its mark in key and chart, its colour, and the text for a row."""

    kind: str
    words: str
    sign: str
    symbol: str
    color: str
    describe: Callable[[Row], str]


def _describe_start(row: Row) -> str:
    world_size = number(row.get("world_size"))
    return f"on {plural(world_size, 'process', 'processes')}" if world_size else ""


def _describe_bad_step(row: Row) -> str:
    samples = row.get("samples")
    listed = ", ".join(map(str, samples[:3])) if isinstance(samples, list) else ""
    rank = "" if number(row.get("rank")) is None else f" on rank {row['rank']}"
    return f"{row.get('what', 'gradient')} not finite{rank}" + (f": {listed}" if listed else "")


def _describe_checkpoint(row: Row) -> str:
    size, stall = number(row.get("bytes")), number(row.get("stall_seconds"))
    words = [gigabytes(size) if size else "", f"training paused for {duration(stall)}" if stall is not None else ""]
    return ", ".join(filter(None, words))


def _describe_corruption(row: Row) -> str:
    return f"{row.get('where', 'a sample')} ({row.get('reason', 'unreadable')})"


MARKS = (
    Mark("checkpoint", "checkpoint", "|", "line-ns", "muted", _describe_checkpoint),
    Mark("start", "start or restart", "▶", "triangle-right", "ink", _describe_start),
    Mark("end", "end", "■", "square", "ink", lambda row: str(row.get("outcome", ""))),
    Mark("bad_step", "refused update", "×", "x-thin", "alarm", _describe_bad_step),
    Mark("corruption", "corrupt sample, replaced", "◆", "diamond", "run-4", _describe_corruption),
)


def draw_timeline(records: Sequence[Record]) -> Chart | None:
    """Draw steps over the time since each run's begin; None if no row has a time."""
    begins = {record.name: _first_time(record) for record in records}
    having = [(index, record) for index, record in enumerate(records) if begins[record.name] is not None]
    if not having:
        return None
    longest = max(_last_time(record) - (begins[record.name] or 0) for _, record in having)
    _, size, unit = next(row for row in _UNITS if longest >= row[0])
    figure = new_figure(f"{unit} since the run's begin", "step", x={"nticks": 12}, y={"rangemode": "tozero"})
    used, num_hidden = [], 0
    for index, record in having:
        begin = begins[record.name] or 0.0
        _add_progress(figure, record, run_color(index), begin, size)
        for mark in MARKS:
            rows = _timed(record.of_kind(mark.kind))
            if rows:
                num_hidden += max(0, len(rows) - _MAX_MARKS)
                _add_marks(figure, record, mark, rows[-_MAX_MARKS:], begin, size)
                used.append(KeyItem(mark.words, mark.color, mark.sign))
    note = "Where the line is interrupted, the run was stopped, or did steps that were lost and repeated."
    if num_hidden:
        note += f" The first {count(num_hidden)} marks are hidden; metrics.jsonl has all."
    return Chart("Steps over time", figure, note, tuple(dict.fromkeys(used)), height=300, is_wide=True)


def find_untimed(records: Sequence[Record]) -> str:
    """Describe the runs whose rows have no time; "" if all have."""
    names = [record.name for record in records if _first_time(record) is None]
    if not names:
        return ""
    return f"{listing(names)}: no row has a time, as in runs of an older release."


def list_events(record: Record) -> list[tuple[str, str, str, str]]:
    """List all events but checkpoints, in order, as (when, step, what, more)."""
    events = [(row, mark) for mark in MARKS if mark.kind != "checkpoint" for row in record.of_kind(mark.kind)]
    events.sort(key=lambda event: (number(event[0].get("step")) or 0.0, number(event[0].get("time")) or 0.0))
    return [
        (moment(number(row.get("time"))), count(number(row.get("step"))), mark.words, mark.describe(row))
        for row, mark in events
    ]


def _timed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if number(row.get("time")) is not None]


def _all_times(record: Record) -> Numbers:
    times = np.concatenate([column(rows, "time") for rows in record.rows.values()]) if record.rows else np.empty(0)
    return times[np.isfinite(times)]


def _first_time(record: Record) -> float | None:
    times = _all_times(record)
    return float(times.min()) if len(times) else None


def _last_time(record: Record) -> float:
    return float(_all_times(record).max())


def _add_progress(figure: go.Figure, record: Record, color: str, begin: float, size: float) -> None:
    """Add the run's step over time, interrupted at each start."""
    rows = _timed(record.of_kind("train"))
    stride = max(1, -(-len(rows) // MAX_POINTS))
    kept = rows[::stride] + (rows[-1:] if stride > 1 else [])
    starts = [(float(row["time"]), number(row.get("step"))) for row in _timed(record.of_kind("start"))]
    points = [(float(row["time"]), number(row.get("step"))) for row in kept]
    # A gap just before each start: the line ends where the process ended.
    points += starts + [(time - 1e-3, None) for time, _ in starts]
    points.sort(key=lambda point: point[0])
    figure.add_scatter(
        x=as_list((np.array([time for time, _ in points]) - begin) / size),
        y=[step for _, step in points],
        mode="lines",
        line={"color": tone(color), "width": 2},
        hovertemplate=f"{safe(record.name)}<br>step %{{y:,}}<extra></extra>",
        meta=record.name,
    )


def _add_marks(figure: go.Figure, record: Record, mark: Mark, rows: list[Row], begin: float, size: float) -> None:
    is_thin = mark.symbol in ("x-thin", "line-ns")
    figure.add_scatter(
        x=as_list((column(rows, "time") - begin) / size),
        y=as_list(column(rows, "step")),
        mode="markers",
        marker={
            "symbol": mark.symbol,
            "size": 9,
            "color": tone(mark.color),
            "line": {"width": 1.6 if is_thin else 1, "color": tone(mark.color if is_thin else "card")},
        },
        customdata=[
            safe(f"{mark.words} at {moment(number(row.get('time')))}. {mark.describe(row)}", 140) for row in rows
        ],
        hovertemplate=f"{safe(record.name)}, step %{{y:,}}<br>%{{customdata}}<extra></extra>",
        meta=record.name,
        cliponaxis=False,
    )
