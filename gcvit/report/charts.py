"""Charts and tables of the page: colours, axes, and columns reduced to as many points as a screen shows.

Charts are plotly's, in the colours of the light theme; `page.js` replaces them for the dark theme. Text from files
enters charts through `safe`, since plotly interprets some of HTML as markup.
"""

import html
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from gcvit.report.run_data import Numbers

# Name: (light theme, dark theme). Each light colour occurs once: it is the key of the dark one.
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
    """Return a colour of the light theme."""
    return PALETTE[name][0]


def soft(name: str) -> str:
    """Return the transparent tone of a colour, for areas behind lines."""
    return _transparent(PALETTE[name][0])


def night_of_day() -> dict[str, str]:
    """Map every colour of a chart from the light to the dark theme."""
    pairs = list(PALETTE.values())
    return dict(pairs) | {_transparent(day): _transparent(night) for day, night in pairs}


def _transparent(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {_SOFT})"


def safe(text: object, max_length: int = 80) -> str:
    """Escape and shorten text for a chart."""
    words = str(text)
    return html.escape(words if len(words) <= max_length else f"{words[: max_length - 1]}…", quote=False)


@dataclass(frozen=True)
class KeyItem:
    """An entry of a chart's key: its text, the palette name of its colour, and its mark."""

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


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    is_number: bool = False
    is_strong: bool = False
    is_alarm: bool = False
    color: str = ""
    """Palette name of a run's colour, shown as a dot before the text."""


@dataclass(frozen=True)
class Table:
    """A table; on a narrow page each row becomes a card, with each heading beside its value."""

    head: list[str]
    rows: list[list[Cell]]


MAX_POINTS = 500
"""Points of a curve at most: about one for each pixel of a phone, one for each two of a screen."""


@dataclass(frozen=True)
class Thinned:
    """A column reduced to points of consecutive rows; arrays are (P,), NaN if none of a point's rows has a number."""

    x: Numbers
    """Values of the last row of each point."""
    mean: Numbers
    low: Numbers
    high: Numbers
    rows_per_point: int
    """1 if every row is drawn."""


def thin(x: Numbers, y: Numbers, max_points: int = MAX_POINTS) -> Thinned:
    """Reduce a column to at most `max_points` points: mean, least and greatest of equally many consecutive rows."""
    rows_per_point = max(1, -(-len(y) // max_points))
    if rows_per_point == 1:
        return Thinned(x, y, y, y, 1)
    begins = np.arange(0, len(y), rows_per_point)
    ends = np.minimum(begins + rows_per_point, len(y))
    is_number = np.isfinite(y)
    nums = np.add.reduceat(is_number.astype(np.float64), begins)
    sums = np.add.reduceat(np.where(is_number, y, 0.0), begins)
    mean = np.divide(sums, nums, out=np.full(len(begins), np.nan), where=nums > 0)
    # fmin and fmax ignore NaN unless all values are NaN.
    return Thinned(x[ends - 1], mean, np.fmin.reduceat(y, begins), np.fmax.reduceat(y, begins), rows_per_point)


def as_list(values: Numbers) -> list[float | None]:
    """Convert values for plotly: six digits, which take a third of the bytes, and None, a gap, for NaN."""
    return [_round(value) if math.isfinite(value) else None for value in values.tolist()]


def _round(value: float) -> float:
    return int(value) if value.is_integer() else float(f"{value:.6g}")


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    """Return the settings of an axis without a zero line."""
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
    """Return the settings of a logarithmic axis, with ticks at 1, 2 and 5 of each power of ten, or at the powers."""
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(greatest)) + 1)
    steps = (1, 2, 5) if greatest < 300 * least else (1,)
    ticks = [step * 10.0**power for power in powers for step in steps]
    # Room at both ends, so that the frame cuts no mark; the range of such an axis is in logarithms.
    room = max(0.02, 0.04 * math.log10(greatest / least))
    ends = [math.log10(least) - room, math.log10(greatest) + room]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks], "range": ends}


def new_figure(
    x_title: str, y_title: str = "", x: dict[str, Any] | None = None, y: dict[str, Any] | None = None
) -> go.Figure:
    """Return an empty figure; `x` and `y` are further settings of its axes."""
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
