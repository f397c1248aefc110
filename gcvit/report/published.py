"""Compare runs with published models: accuracy on ImageNet-1K against parameters, multiply-adds and speed.

`published.yaml` holds the published numbers and their sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import yaml

from gcvit.model.variants import VARIANTS
from gcvit.report.charts import Cell, Chart, KeyItem, Table, log_axis, new_figure, safe, tone
from gcvit.report.formatting import count, listing, percent, plain
from gcvit.report.run_data import Record, Row, number, section
from gcvit.report.training import run_color

IMAGENET_CLASSES, IMAGENET_VAL_IMAGES = 1000, 50_000
_FLOPS_PER_GMAC = 3 * 2e9  # training is three forward passes, of two operations a multiply-add


@dataclass(frozen=True)
class Point:
    """A published model. `speed` is in images a second of inference."""

    name: str
    top1: float
    millions: float
    gmacs: float
    speed: float | None = None


@dataclass(frozen=True)
class Family:
    name: str
    source: str
    points: tuple[Point, ...]


_DATA = yaml.safe_load((files("gcvit.report") / "published.yaml").read_text())
PEERS = tuple(
    Family(peer["name"], peer["source"], tuple(Point(**point) for point in peer["points"])) for peer in _DATA["peers"]
)
GCVIT_SOURCE = _DATA["gcvit"]["source"]
_SIGNS = (("square", "■"), ("diamond", "◆"), ("triangle-up", "▲"))
_LABEL_PLACES = {
    "XXT": "middle right",
    "XT": "middle right",
    "T2": "bottom right",
    "S2": "bottom right",
    "L 384": "bottom left",
}
_SHORT = {"xxtiny": "XXT", "xtiny": "XT", "tiny": "T", "tiny2": "T2", "small": "S", "small2": "S2", "base": "B"}


def _gcvit(is_21k: bool) -> tuple[Point, ...]:
    points = []
    for key, variant in VARIANTS.items():
        if (variant.weights_tag != "in1k") == is_21k:
            size = key.removeprefix("gc_vit_")
            name = _SHORT.get(size, size.replace("large_", "L ").replace("large", "L"))
            speed = _DATA["gcvit"]["speeds"].get(key)
            point = Point(name, variant.published_top1, variant.num_params / 1e6, variant.published_gmacs, speed)
            points.append(point)
    return tuple(points)


GCVIT = Family("GC ViT", GCVIT_SOURCE, _gcvit(is_21k=False))
GCVIT_21K = Family("GC ViT, pre-trained on ImageNet-21K", GCVIT_SOURCE, _gcvit(is_21k=True))


@dataclass(frozen=True)
class Place:
    """The values of a run. `top1` is None unless it was measured on ImageNet-1K's 50,000 validation images."""

    name: str
    index: int
    top1: float | None
    millions: float | None
    gmacs: float | None
    speed: float | None
    device: str


def find_place(record: Record, index: int) -> Place:
    start = record.start
    parameters, flops = number(start.get("parameters")), number(start.get("train_flops_per_image"))
    speeds = []
    for evaluation in record.evaluations:
        speed, num_processes = number(evaluation.get("images_per_second")), number(evaluation.get("world_size"))
        if speed and num_processes:
            speeds.append((speed / num_processes, str(evaluation.get("device") or "a device not named")))
    return Place(
        name=record.name,
        index=index,
        top1=_imagenet_top1(record),
        millions=parameters / 1e6 if parameters else None,
        gmacs=flops / _FLOPS_PER_GMAC if flops else None,
        speed=max(speeds)[0] if speeds else None,
        device=max(speeds)[1] if speeds else "",
    )


def _imagenet_top1(record: Record) -> float | None:
    """Return the best accuracy on ImageNet-1K's val, of the evaluations or of the training's own."""
    if number(section(record.config, "model").get("num_classes")) != IMAGENET_CLASSES:
        return None
    results = [section(evaluation, "result") for evaluation in record.evaluations if _is_plain(evaluation)]
    results += [row for weights in ("ema", "weights") for row in record.of_kind(f"val/{weights}")]
    whole = [row for row in results if number(row.get("num_samples")) == IMAGENET_VAL_IMAGES]
    return max((top1 for row in whole if (top1 := number(row.get("top1"))) is not None), default=None)


def _is_plain(evaluation: Row) -> bool:
    """Return whether an evaluation has ImageNet's images and labels, and one view of each image."""
    options = section(evaluation, "options")
    sizes = options.get("img_size", [])
    is_averaged = options.get("tta") is not None or (isinstance(sizes, list) and len(sizes) > 1)
    return options.get("label_set") in (None, "imagenet") and not is_averaged


def draw_comparison(records: Sequence[Record]) -> list[Chart]:
    """Draw accuracy against parameters, multiply-adds and speed, of the published models and of the runs."""
    places = [find_place(record, index) for index, record in enumerate(records)]
    return [
        _draw(places, "Accuracy against parameters", "parameters, millions", "millions"),
        _draw(places, "Accuracy against multiply-adds", "multiply-adds of an image, 10⁹ (GMAC)", "gmacs"),
        _draw(places, "Accuracy against speed of inference", "images a second", "speed", is_wide=True),
    ]


def describe_comparison(records: Sequence[Record]) -> list[str]:
    """Describe what the charts show of the runs, and what they lack."""
    places = [find_place(record, index) for index, record in enumerate(records)]
    sentences = []
    elsewhere = [place.name for place in places if place.top1 is None]
    if elsewhere:
        were = "was" if len(elsewhere) == 1 else "were"
        sentences.append(
            f"{listing(elsewhere)} {were} not measured on the {count(IMAGENET_VAL_IMAGES)} validation images of "
            "ImageNet-1K, so no accuracy is comparable with the published ones: a dashed line shows the cost alone."
        )
    unknown = [place.name for place in places if place.millions is None]
    if unknown:
        sentences.append(f"The rows of {listing(unknown)} lack the model's parameters and multiply-adds.")
    unmeasured = [place.name for place in places if place.speed is None]
    if unmeasured:
        sentences.append(f"No evaluation of {listing(unmeasured)} has measured a speed.")
    measured = [f"{place.name}: {count(place.speed)} img/s on {place.device}" for place in places if place.speed]
    if measured:
        sentences.append(
            f"Measured by evaluate.py, including reading and decoding, for each process: {listing(measured)}. The "
            "published speeds are of a model alone, on another device, so compare them with each other only."
        )
    return sentences


def _draw(places: Sequence[Place], title: str, x_title: str, of: str, is_wide: bool = False) -> Chart:
    shown = [getattr(point, of) for family in (*PEERS, GCVIT, GCVIT_21K) for point in family.points]
    values = [x for x in (*shown, *(getattr(place, of) for place in places)) if x]
    figure = new_figure(x_title, x=log_axis(min(values), max(values)), y={"nticks": 7})
    key = []
    above = "top right" if of == "speed" else "top left"  # away from the line
    families = [(family, f"peer-{i}", *sign) for i, (family, sign) in enumerate(zip(PEERS, _SIGNS, strict=True))]
    for family, color, symbol, sign in [
        *families,
        (GCVIT, "ink", "circle", "line"),
        (GCVIT_21K, "ink", "circle-open", "dotted"),
    ]:
        is_ours, is_21k = color == "ink", family is GCVIT_21K
        points = [point for point in family.points if getattr(point, of) is not None]
        if not points:
            continue
        figure.add_scatter(
            x=[getattr(point, of) for point in points],
            y=[point.top1 for point in points],
            mode="lines+markers+text" if is_ours else "lines+markers",
            text=[safe(point.name) for point in points] if is_ours else None,
            textposition=[_LABEL_PLACES.get(point.name, above) for point in points],
            textfont={"size": 11, "color": tone("muted")},
            customdata=[safe(point.name if not is_ours else f"GC ViT-{point.name}") for point in points],
            line={"color": tone(color), "width": 1.6 if is_ours else 1.2, "dash": "dot" if is_21k else "solid"},
            marker={"size": 7, "symbol": symbol},
            hovertemplate="%{customdata}: %{y:.2f} %<br>%{x:.4g}<extra></extra>",
            cliponaxis=False,
        )
        key.append(KeyItem(family.name, color, sign))
    for place in places:
        x = getattr(place, of)
        if x is None:
            continue
        color = tone(run_color(place.index))
        if place.top1 is not None:
            figure.add_scatter(
                x=[x],
                y=[place.top1],
                mode="markers",
                meta=place.name,
                marker={"size": 13, "symbol": "star", "color": color, "line": {"width": 1, "color": tone("card")}},
                hovertemplate=f"{safe(place.name)}: %{{y:.2f}} %<br>%{{x:.4g}}<extra></extra>",
            )
            key.append(KeyItem(place.name, run_color(place.index), "★"))
        else:
            lowest, highest = 79.5, 88.0
            figure.add_scatter(
                x=[x, x],
                y=[lowest, highest],
                mode="lines",
                meta=place.name,
                line={"color": color, "width": 1.6, "dash": "dash"},
                hovertemplate=f"{safe(place.name)}<br>%{{x:.4g}}<extra></extra>",
            )
            key.append(KeyItem(place.name, run_color(place.index), "dashed"))
    return Chart(title, figure, "", tuple(key), height=360, is_wide=is_wide)


def tabulate_published() -> Table:
    rows = [
        [
            Cell(point.name if point.name.startswith(family.name) else f"GC ViT-{point.name}"),
            Cell(percent(point.top1, 1 if point.top1 == round(point.top1, 1) else 2), is_number=True),
            Cell(plain(point.millions, 4), is_number=True),
            Cell(plain(point.gmacs, 4), is_number=True),
            Cell(count(point.speed), is_number=True),
        ]
        for family in (GCVIT, GCVIT_21K, *PEERS)
        for point in family.points
    ]
    return Table(["model", "top-1", "parameters, M", "GMAC", "img/s"], rows)


def list_sources() -> list[str]:
    return [
        f"GC ViT: {GCVIT_SOURCE}.",
        *(f"{family.name}: {family.source}." for family in PEERS),
        f"Speeds: {_DATA['speed_source']}.",
    ]
