"""The evaluations of a run: their table, calibration, worst classes and confusions."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from plotly.subplots import make_subplots

from gcvit.report.charts import Cell, Chart, KeyItem, Table, as_list, axis, new_figure, tone
from gcvit.report.formatting import count, duration, listing, percent, plain
from gcvit.report.run_data import Record, Row, column, number, rows_of, section
from gcvit.report.samples import index_of, read_images
from gcvit.report.training import run_color

_NUM_WORST = 12
_NUM_CONFUSED = 12


@dataclass(frozen=True)
class Mistake:
    """A misclassified sample; `picture` is empty if there is none."""

    picture: str
    predicted: str
    confidence: str
    key: str


@dataclass(frozen=True)
class WorstClass:
    name: str
    score: str
    mistakes: list[Mistake]


@dataclass(frozen=True)
class Detail:
    """The page's details of one evaluation."""

    title: str
    reliability: Chart | None
    worst: list[WorstClass]
    confused: Table | None
    notes: list[str]
    origin: list[tuple[str, str]]
    """How to reproduce it: name and value."""


def title_of(record: Record, evaluation: Row, has_siblings: bool) -> str:
    step = number(section(evaluation, "checkpoint").get("step"))
    words = f"{evaluation.get('name')}, {_weights(evaluation)}" + (f", step {count(step)}" if step else "")
    return f"{record.name}: {words}" if has_siblings else words


def _weights(evaluation: Row) -> str:
    weights = str(evaluation.get("weights", "weights"))
    return {"ema": "EMA", "model": "raw weights"}.get(weights, weights)


def tabulate(records: Sequence[Record]) -> Table | None:
    """Tabulate each evaluation of each run; None if there is none."""
    head = ["run", "set", "weights", "step", "top-1", "top-5", "loss", "ECE", "images", "left out", "img/s"]
    rows = []
    for index, record in enumerate(records):
        for evaluation in record.evaluations:
            result = section(evaluation, "result")
            ece, num_skipped = number(result.get("ece")), number(result.get("num_skipped"))
            rows.append(
                [
                    Cell(record.name, color=run_color(index)),
                    Cell(str(evaluation.get("name"))),
                    Cell(_weights(evaluation)),
                    Cell(count(number(section(evaluation, "checkpoint").get("step"))), is_number=True),
                    Cell(percent(number(result.get("top1"))), is_number=True, is_strong=True),
                    Cell(percent(number(result.get("top5"))), is_number=True),
                    Cell(plain(number(result.get("loss"))), is_number=True),
                    Cell("–" if ece is None else plain(ece, 3), is_number=True),
                    Cell(count(number(result.get("num_samples"))), is_number=True),
                    Cell(count(num_skipped), is_number=True, is_alarm=bool(num_skipped)),
                    Cell(count(number(evaluation.get("images_per_second"))), is_number=True),
                ]
            )
    if not rows:
        return None
    kept = [i for i in range(len(head)) if i or len(records) > 1]
    return Table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])


def describe(record: Record, index: int, evaluation: Row, has_siblings: bool) -> Detail:
    """Describe the details of one evaluation beyond its row of the table."""
    result = section(evaluation, "result")
    worst, sentence = _find_worst(evaluation)
    notes = [sentence] if sentence else []
    if not rows_of(result, "per_class"):
        notes.append("It has no accuracies by class.")
    return Detail(
        title=title_of(record, evaluation, has_siblings),
        reliability=_draw_reliability(record, index, result),
        worst=worst,
        confused=_tabulate_confused(result),
        notes=notes,
        origin=_describe_origin(evaluation),
    )


def _draw_reliability(record: Record, index: int, result: Row) -> Chart | None:
    """Draw accuracy over confidence, above the share of images of each bin."""
    bins = [row for row in rows_of(result, "reliability") if (number(row.get("num")) or 0) > 0]
    if not bins:
        return None
    base = new_figure("confidence")
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.76, 0.24], vertical_spacing=0.05)
    figure.update_layout({k: v for k, v in base.layout.to_plotly_json().items() if k not in ("xaxis", "yaxis")})
    low, high, num = (column(bins, name) for name in ("low", "high", "num"))
    accuracy, confidence = column(bins, "accuracy"), column(bins, "confidence")
    color = tone(run_color(index))
    about = [f"{count(value)} images" for value in num]
    shared = {"x": as_list((low + high) / 2), "width": as_list((high - low) * 0.92), "customdata": about}
    bar = {"color": color, "opacity": 0.3, "line": {"width": 0}}
    figure.add_bar(**shared, y=as_list(accuracy), marker=bar, hoverinfo="skip", row=1, col=1)
    figure.add_scatter(
        x=[0, 1],
        y=[0, 1],
        mode="lines",
        line={"color": tone("muted"), "width": 1, "dash": "dot"},
        hoverinfo="skip",
        row=1,
        col=1,
    )
    figure.add_scatter(
        x=as_list(confidence),
        y=as_list(accuracy),
        mode="markers",
        customdata=about,
        marker={"size": as_list(5 + 9 * np.sqrt(num / num.max())), "color": color, "line": {"width": 0}},
        hovertemplate="confidence %{x:.1%}, accuracy %{y:.1%}<br>%{customdata}<extra></extra>",
        row=1,
        col=1,
    )
    share = num / num.sum()
    figure.add_bar(
        **shared,
        y=as_list(share),
        marker={"color": tone("muted"), "opacity": 0.45, "line": {"width": 0}},
        hovertemplate="%{customdata}, %{y:.1%} of all<extra></extra>",
        row=2,
        col=1,
    )
    figure.update_xaxes(axis(showgrid=False, range=[0, 1], tickformat=".0%", nticks=6))
    figure.update_xaxes(title_text="confidence of the prediction", row=2, col=1)
    figure.update_yaxes(axis("accuracy", tickformat=".0%", nticks=6, range=[0, 1.02]), row=1, col=1)
    figure.update_yaxes(axis("images", tickformat=".0%", nticks=3, rangemode="tozero"), row=2, col=1)
    ece = number(result.get("ece"))
    note = "" if ece is None else f"Expected calibration error {plain(ece, 3)}. "
    note += "On the dotted line, accuracy equals confidence; below it, the model is overconfident."
    key = (
        KeyItem("accuracy of a bin, at its mean confidence", run_color(index), "●"),
        KeyItem("exactly calibrated", "muted", "dotted"),
    )
    return Chart("Reliability", figure, note, key, height=380)


def _find_worst(evaluation: Row) -> tuple[list[WorstClass], str]:
    """Find the classes with the lowest accuracy, worst first, and a sentence on missing pictures."""
    result = section(evaluation, "result")
    classes = [row for row in rows_of(result, "per_class") if (number(row.get("num")) or 0) > 0]
    wrong = [row for row in classes if (number(row.get("correct_top1")) or 0) < (number(row.get("num")) or 0)]
    wrong.sort(key=lambda row: (number(row.get("correct_top1")) or 0) / (number(row.get("num")) or 1))
    worst = wrong[:_NUM_WORST]
    if not worst:
        return [], "Every image is classified correctly." if classes else ""
    mistakes: dict[str, list[Row]] = defaultdict(list)
    for mistake in rows_of(result, "mistakes"):
        mistakes[str(mistake.get("label"))].append(mistake)
    shown = {str(row.get("class")): mistakes[str(row.get("class"))][:4] for row in worst}
    indices = [index for rows in shown.values() for row in rows if (index := index_of(row)) is not None]
    pictures, sentence = read_images(section(evaluation, "data"), indices)
    found = []
    for row in worst:
        num, right = number(row.get("num")) or 0, number(row.get("correct_top1")) or 0
        name = str(row.get("class"))
        found.append(
            WorstClass(name, f"{count(right)} of {count(num)} correct", [_show(m, pictures) for m in shown[name]])
        )
    return found, sentence


def _show(mistake: Row, pictures: dict[int, str]) -> Mistake:
    confidence = number(mistake.get("confidence"))
    return Mistake(
        picture=pictures.get(index_of(mistake) or 0, "") if index_of(mistake) is not None else "",
        predicted=str(mistake.get("predicted")),
        confidence="" if confidence is None else percent(100 * confidence, 0),
        key=str(mistake.get("key", "")),
    )


def _tabulate_confused(result: Row) -> Table | None:
    pairs = rows_of(result, "confused")[:_NUM_CONFUSED]
    if not pairs:
        return None
    rows = [
        [
            Cell(str(pair.get("label"))),
            Cell(str(pair.get("predicted"))),
            Cell(count(number(pair.get("num"))), is_number=True),
        ]
        for pair in pairs
    ]
    return Table(["label", "predicted as", "times"], rows)


def _describe_origin(evaluation: Row) -> list[tuple[str, str]]:
    checkpoint, data = section(evaluation, "checkpoint"), section(evaluation, "data")
    versions = section(evaluation, "versions")
    named = [
        ("checkpoint", checkpoint.get("path")),
        ("checkpoint's sha256", checkpoint.get("sha256")),
        ("data", f"{data.get('dir')}/{data.get('split')}" if data else None),
        ("data's sha256", data.get("sha256")),
        ("command", evaluation.get("command")),
        ("options", listing([f"{k} {v}" for k, v in section(evaluation, "options").items() if v is not None])),
        ("versions", listing([f"{k} {v}" for k, v in versions.items() if v is not None])),
        ("took", duration(number(evaluation.get("seconds"))) if evaluation.get("seconds") is not None else None),
        ("processes", evaluation.get("world_size")),
    ]
    return [(name, str(value)) for name, value in named if value not in (None, "")]
