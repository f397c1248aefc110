"""The curves of a training over steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from gcvit.report.charts import Chart, KeyItem, as_list, log_axis, new_figure, safe, soft, thin, tone
from gcvit.report.formatting import count
from gcvit.report.run_data import VAL_PREFIX, Numbers, Record, Row, column

_LOG_SPAN = 30.0  # a column that spans more is drawn on a logarithmic axis
_MAX_RESTARTS = 20
_HIDDEN_AXIS = {
    "overlaying": "y",
    "range": [0, 1],
    "visible": False,
    "fixedrange": True,
}  # full height
_EVALUATED = (("weights", "raw weights", "dash", "circle-open"), ("ema", "EMA", "solid", "circle"))


@dataclass(frozen=True)
class Scale:
    """The x axis of curves: steps, or images if the runs' steps are of different sizes."""

    title: str
    in_images: bool

    def of(self, record: Record, rows: Sequence[Row]) -> Numbers:
        return column(rows, "step") * ((record.batch_size or 1) if self.in_images else 1)


def choose_scale(records: Sequence[Record]) -> Scale:
    sizes = {record.batch_size for record in records}
    return Scale("images seen", True) if len(sizes) > 1 and None not in sizes else Scale("step", False)


def run_color(index: int) -> str:
    """Return the palette name of a run's colour."""
    return f"run-{index}"


def draw_curves(records: Sequence[Record]) -> list[Chart]:
    """Draw a chart for each column of the training rows that any run has."""
    scale = choose_scale(records)
    charts = [
        _draw_loss(records, scale),
        _draw_accuracy(records, scale),
        _draw_column(records, scale, "lr", "Learning rate", y={"exponentformat": "e"}),
        _draw_column(records, scale, "grad_norm", "Gradient norm, before clipping", may_be_log=True),
        _draw_column(records, scale, "images_per_second", "Throughput", unit="images a second", from_zero=True),
        _draw_column(records, scale, "mfu", "Share of the devices' peak (MFU)", times=100, unit="%", from_zero=True),
        _draw_column(records, scale, "data_wait", "Time spent waiting for data", times=100, unit="%", from_zero=True),
        _draw_column(
            records, scale, "memory_bytes", "Peak memory of the fullest process", times=1e-9, unit="GB", from_zero=True
        ),
    ]
    return [chart for chart in charts if chart is not None]


def find_missing(record: Record) -> str:
    """Describe the curves that the run cannot have; "" if it has all."""
    if not record.of_kind("train"):
        return f"{record.name} has no training rows, so no curves."
    lacking = [] if _has(record, "train", "train_top1") else ["accuracy on training batches"]
    evaluated = [name for name, *_ in _EVALUATED if record.of_kind(VAL_PREFIX + name)]
    if not evaluated:
        lacking.append("evaluation yet")
    elif "ema" not in evaluated:
        lacking.append("EMA")
    return f"{record.name} has no {' and no '.join(lacking)}." if lacking else ""


def _has(record: Record, kind: str, name: str) -> bool:
    return bool(np.isfinite(column(record.of_kind(kind), name)).any())


def _draw_loss(records: Sequence[Record], scale: Scale) -> Chart | None:
    return _draw_trained_and_evaluated(
        records,
        scale,
        "Loss",
        "loss",
        "loss",
        "On training batches the targets are smoothed and mixed, so that it may stay above the evaluated loss.",
    )


def _draw_accuracy(records: Sequence[Record], scale: Scale) -> Chart | None:
    return _draw_trained_and_evaluated(
        records,
        scale,
        "Top-1 accuracy, %",
        "train_top1",
        "top1",
        "On training batches a prediction is correct if it is the larger part of a mixed image.",
    )


def _draw_trained_and_evaluated(
    records: Sequence[Record], scale: Scale, title: str, trained: str, evaluated: str, note: str
) -> Chart | None:
    figure, rows_per_point, key = new_figure(scale.title), 1, []
    of_key = run_color(0) if len(records) == 1 else "muted"  # with several runs, a colour is a run's
    for index, record in enumerate(records):
        color = run_color(index)
        if _has(record, "train", trained):
            rows_per_point = max(rows_per_point, _add_curve(figure, record, scale, trained, color, width=1.1))
            key.append(KeyItem("training batches", of_key, "thin"))
        for name, words, dash, symbol in _EVALUATED:
            rows = record.of_kind(VAL_PREFIX + name)
            y = column(rows, evaluated)
            if not np.isfinite(y).any():
                continue
            thinned = thin(scale.of(record, rows), y)
            rows_per_point = max(rows_per_point, thinned.rows_per_point)
            is_sparse = len(thinned.x) <= 60
            figure.add_scatter(
                x=as_list(thinned.x),
                y=as_list(thinned.mean),
                mode="lines+markers" if is_sparse else "lines",
                line={"color": tone(color), "width": 2, "dash": dash},
                marker={"symbol": symbol, "size": 6},
                hovertemplate=f"{safe(record.name)}, {words}<br>{scale.title} %{{x:,}}: %{{y:.5g}}<extra></extra>",
                meta=record.name,
            )
            key.append(KeyItem(f"evaluated, {words}", of_key, "dashed" if dash == "dash" else "line"))
    if not figure.data:
        return None
    key += _add_restarts(figure, records, scale)
    has_trained = any(item.mark == "thin" for item in key)
    notes = [note if has_trained else "", _explain(rows_per_point)]
    return Chart(title, figure, " ".join(filter(None, notes)), tuple(dict.fromkeys(key)))


def _draw_column(
    records: Sequence[Record],
    scale: Scale,
    name: str,
    title: str,
    *,
    unit: str = "",
    times: float = 1.0,
    from_zero: bool = False,
    may_be_log: bool = False,
    y: dict[str, Any] | None = None,
) -> Chart | None:
    having = [(index, record) for index, record in enumerate(records) if _has(record, "train", name)]
    if not having:
        return None
    settings: dict[str, Any] = {"rangemode": "tozero"} if from_zero else {}
    values = np.concatenate([column(record.of_kind("train"), name) for _, record in having])
    positive = values[np.isfinite(values) & (values > 0)]
    if may_be_log and len(positive) and positive.max() > _LOG_SPAN * positive.min():
        settings = log_axis(float(positive.min()), float(positive.max()))
    figure, rows_per_point = new_figure(scale.title, y=settings | (y or {})), 1
    for index, record in having:
        rows_per_point = max(rows_per_point, _add_curve(figure, record, scale, name, run_color(index), times=times))
        if name == "grad_norm":
            _add_refused(figure, record, scale)
    key = [KeyItem("refused: not finite", "alarm", "×")] if any(t.mode == "markers" for t in figure.data) else []
    key += _add_restarts(figure, records, scale)
    return Chart(f"{title}, {unit}" if unit else title, figure, _explain(rows_per_point), tuple(key))


def _add_curve(
    figure: go.Figure, record: Record, scale: Scale, name: str, color: str, times: float = 1.0, width: float = 1.6
) -> int:
    """Draw a column of the training rows, and return the number of rows per point."""
    rows = record.of_kind("train")
    thinned = thin(scale.of(record, rows), column(rows, name) * times)
    x = as_list(thinned.x)
    if thinned.rows_per_point > 1:
        for bound, fill in ((thinned.low, None), (thinned.high, "tonexty")):
            figure.add_scatter(
                x=x,
                y=as_list(bound),
                mode="lines",
                line={"width": 0, "color": tone(color)},
                fill=fill,
                fillcolor=soft(color),
                hoverinfo="skip",
                meta=record.name,
            )
    figure.add_scatter(
        x=x,
        y=as_list(thinned.mean),
        mode="lines" if len(x) > 1 else "lines+markers",
        line={"color": tone(color), "width": width},
        hovertemplate=f"{safe(record.name)}<br>{scale.title} %{{x:,}}: %{{y:.5g}}<extra></extra>",
        meta=record.name,
    )
    return thinned.rows_per_point


def _add_refused(figure: go.Figure, record: Record, scale: Scale) -> None:
    """Add a mark at the bottom of the chart for each refused update."""
    rows = record.of_kind("train")
    thinned = thin(scale.of(record, rows), column(rows, "refused_steps"))
    x = thinned.x[thinned.high > 0]
    if not len(x):
        return
    figure.add_scatter(
        x=as_list(x),
        y=[0.03] * len(x),
        yaxis="y2",
        mode="markers",
        marker={"symbol": "x-thin", "size": 7, "line": {"width": 1.6, "color": tone("alarm")}},
        hovertemplate=f"{safe(record.name)}<br>updates refused before {scale.title} %{{x:,}}<extra></extra>",
        meta=record.name,
    )
    figure.update_layout(yaxis2=_HIDDEN_AXIS)


def _add_restarts(figure: go.Figure, records: Sequence[Record], scale: Scale) -> list[KeyItem]:
    """Add a vertical line at each restart, and return the entries of the key."""
    for index, record in enumerate(records):
        restarts = scale.of(record, record.of_kind("start")[1:][-_MAX_RESTARTS:])
        if len(restarts):
            figure.add_scatter(
                x=as_list(np.repeat(restarts, 3)),
                y=[0, 1, None] * len(restarts),
                yaxis="y2",
                mode="lines",
                line={"color": tone(run_color(index)), "width": 1, "dash": "dot"},
                hovertemplate=f"{safe(record.name)}<br>restart at {scale.title} %{{x:,}}<extra></extra>",
                meta=record.name,
            )
    if not any(trace.yaxis == "y2" and trace.mode == "lines" for trace in figure.data):
        return []
    figure.update_layout(yaxis2=_HIDDEN_AXIS)
    return [KeyItem("restart", run_color(0) if len(records) == 1 else "muted", "dotted")]


def _explain(rows_per_point: int) -> str:
    if rows_per_point == 1:
        return ""
    return (
        f"A point is the mean of up to {count(rows_per_point)} rows; the band spans the least and the greatest of them."
    )
