"""What bounds a run: the seconds of each stage of a step, and the stage that each logging step named."""

from collections import Counter

import numpy as np

from gcvit.report.charts import Chart, KeyItem, as_list, new_figure, safe, thin, tone
from gcvit.report.formatting import count, percent
from gcvit.report.run_data import Record, column, number, section
from gcvit.report.training import Scale

STAGES = ("compute", "communication", "copy", "collation", "augmentation", "decoding", "storage", "checkpoint")
"""Stages from the bottom of the chart: the computation first, then back along the input to the disk."""
_MUCH_MORE = 1.5  # times the share of a rank if all are equally slow; above it the rank is named


def draw_stages(record: Record, scale: Scale, has_siblings: bool) -> Chart | None:
    """Draw the seconds per step by stage, stacked; None if no row has them."""
    rows = record.of_kind("train")
    stages = [section(row, "stages") for row in rows]
    x = scale.of(record, rows)
    seconds = {stage: column(stages, stage) for stage in STAGES}
    known = {stage: values for stage, values in seconds.items() if np.nan_to_num(values).max(initial=0.0) > 0}
    if not known:
        return None
    figure, rows_per_point = new_figure(scale.title, y={"rangemode": "tozero"}), 1
    for stage, values in known.items():
        thinned = thin(x, values)
        rows_per_point = thinned.rows_per_point
        figure.add_scatter(
            x=as_list(thinned.x),
            y=as_list(np.nan_to_num(thinned.mean)),
            mode="lines",
            line={"width": 0.5, "color": tone("card")},
            stackgroup="stages",
            fillcolor=tone(stage),
            hovertemplate=f"{stage}: %{{y:.3g}} s<extra>{safe(record.name)}</extra>",
        )
    # The key has the order of the stack, from the top.
    key = tuple(KeyItem(stage, stage, "area") for stage in reversed(known))
    note = describe_bounds(record)
    if rows_per_point > 1:
        note += f" A point is the mean of up to {count(rows_per_point)} rows."
    title = "Seconds a step, by stage" + (f": {record.name}" if has_siblings else "")
    return Chart(title, figure, note, key, is_wide=not has_siblings)


def describe_bounds(record: Record) -> str:
    """Describe how often each stage bound the run, and which rank was the slowest most often."""
    rows = record.of_kind("train")
    bounds = Counter(str(row["bound_by"]) for row in rows if row.get("bound_by") is not None)
    if not bounds:
        return ""
    total = bounds.total()
    shares = ", ".join(f"{stage} in {percent(100 * num / total, 0)}" for stage, num in bounds.most_common(3))
    ranks = Counter(str(row["slowest_rank"]) for row in rows if row.get("slowest_rank") is not None)
    slowest = ""
    rank, num = ranks.most_common(1)[0] if ranks else ("", 0)
    world_size = number(record.start.get("world_size")) or len(ranks)
    if world_size > 1 and num > _MUCH_MORE * ranks.total() / world_size:
        slowest = f" Rank {rank} was the slowest in {percent(100 * num / ranks.total(), 0)} of them."
    return f"The run was bound by {shares} of its logging steps.{slowest}"
