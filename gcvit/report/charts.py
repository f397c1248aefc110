"""Colours, and what all charts have in common. A chart is plotly's; colours are those of paper, and `page.js` swaps
them for the night's.

Text that comes from files goes into charts through `safe`: plotly takes some of HTML for markup.
"""

import html
import math
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from gcvit.report.run_data import Numbers

# Name: (by day, by night). Each colour by day occurs once, since it is what a colour by night is looked up by.
# fmt: off
PALETTE: dict[str, tuple[str, str]] = {
    "page": ("#faf9f6", "#141618"), "card": ("#ffffff", "#1b1e21"), "ink": ("#21252a", "#e7e5df"),
    "muted": ("#5b636c", "#a3a9b0"), "line": ("#dfdcd5", "#33373c"), "grid": ("#eeece7", "#282c30"),
    "alarm": ("#b3382c", "#f08b7f"),
    "run-0": ("#2b6a9b", "#74b3e0"), "run-1": ("#bd5f28", "#eb9a66"), "run-2": ("#39805a", "#79c298"),
    "run-3": ("#7a57a3", "#b799de"), "run-4": ("#98740f", "#dab856"), "run-5": ("#ab4670", "#e68cae"),
    "run-6": ("#2a8389", "#6cc5cb"), "run-7": ("#695f55", "#b5aa9e"),
    "storage": ("#8a4b33", "#b9715a"), "decoding": ("#c17142", "#d98d60"), "augmentation": ("#dba35e", "#e0b077"),
    "collation": ("#e7cf9d", "#d8c79c"), "copy": ("#9bbfa6", "#8fb59b"), "compute": ("#6c9bbd", "#6f9fc2"),
    "communication": ("#9082b5", "#a396c9"), "checkpoint": ("#a2a19b", "#8b8d90"),
    "peer-0": ("#8794a3", "#7d8b9b"), "peer-1": ("#b39a6b", "#a8925f"), "peer-2": ("#8aa58b", "#7f9d81"),
}
# fmt: on
MAX_RUNS = sum(name.startswith("run-") for name in PALETTE)
_SOFT = 0.18
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"


def tone(name: str) -> str:
    """A colour by day."""
    return PALETTE[name][0]


def soft(name: str) -> str:
    """The same, for areas behind lines."""
    return _transparent(PALETTE[name][0])


def night_of_day() -> dict[str, str]:
    """Every colour that a chart may have: by day to by night."""
    pairs = list(PALETTE.values())
    return dict(pairs) | {_transparent(day): _transparent(night) for day, night in pairs}


def _transparent(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {_SOFT})"


def safe(text: object, max_length: int = 80) -> str:
    """Text for a chart: without markup, and not endless."""
    words = str(text)
    return html.escape(words if len(words) <= max_length else f"{words[: max_length - 1]}…", quote=False)


@dataclass(frozen=True)
class KeyItem:
    """An entry of a chart's key: what it is, the palette's name of its colour, and how it is drawn."""

    text: str
    color: str
    mark: str = "line"
    """"line", "thin", "dashed", "dotted" or "area"; else the sign itself."""


@dataclass(frozen=True)
class Chart:
    """A chart with its heading, its key, and a sentence on how to read it."""

    title: str
    figure: go.Figure
    note: str = ""
    key: tuple[KeyItem, ...] = ()
    height: int = 260
    is_wide: bool = False


def as_list(values: Numbers) -> list[float | None]:
    """Whole numbers as they are, others with six digits, a third of the bytes; what is no number makes a gap."""
    return [_round(value) if math.isfinite(value) else None for value in values.tolist()]


def _round(value: float) -> float:
    return int(value) if value.is_integer() else float(f"{value:.6g}")


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    """An axis: quiet, without a zero line."""
    base: dict[str, Any] = {
        "title": {"text": title, "standoff": 8, "font": {"size": 12}},
        "gridcolor": tone("grid"),
        "linecolor": tone("line"),
        "tickcolor": tone("line"),
        "tickfont": {"size": 12},
        "zeroline": False,
        "automargin": True,
        "ticklabeloverflow": "allow",
    }
    return base | more


def log_axis(least: float, greatest: float) -> dict[str, Any]:
    """Settings of a logarithmic axis, with ticks at 1, 2 and 5 of each power of ten; at the powers, if it is long."""
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(greatest)) + 1)
    steps = (1, 2, 5) if greatest < 300 * least else (1,)
    ticks = [step * 10.0**power for power in powers for step in steps]
    # Room at both ends, so that no sign is cut by the frame; the range of such an axis is of logarithms.
    room = max(0.02, 0.04 * math.log10(greatest / least))
    ends = [math.log10(least) - room, math.log10(greatest) + room]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks], "range": ends}


def new_figure(
    x_title: str, y_title: str = "", x: dict[str, Any] | None = None, y: dict[str, Any] | None = None
) -> go.Figure:
    """An empty figure; `x` and `y` are further settings of its axes."""
    figure = go.Figure()
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 13, "color": tone("muted")},
        margin={"l": 46, "r": 16, "t": 8, "b": 38},
        showlegend=False,
        hovermode="closest",
        hoverlabel={"bgcolor": tone("card"), "bordercolor": tone("line"), "font": {"color": tone("ink"), "size": 13}},
        xaxis=axis(x_title, showgrid=False, showline=True, ticks="outside", ticklen=4, nticks=7) | (x or {}),
        yaxis=axis(y_title, nticks=6) | (y or {}),
    )
    return figure
