"""Draw docs/architecture.svg from a model: every shape and number in it is read from the module. Needs matplotlib.

python -m docs.architecture
python -m docs.architecture --model gc_vit_large --out large.png
"""

import argparse
from collections.abc import Sequence
from math import nan
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from timm.layers import LayerScale
from torch import nn

from gcvit.model import VARIANTS, GCViT, create_model
from gcvit.model.attention import WindowAttention
from gcvit.model.gcvit import NUM_STAGES
from gcvit.model.layers import Block, FusedBlock, SqueezeExcite
from gcvit.model.summary import Row, summarize

PICTURE = Path(__file__).with_name("architecture.svg")
WIDTH, HEIGHT = 14.0, 10.4  # inches, which are also the units of all places
INK, FAINT = "#1f2933", "#7b8794"
LOCAL, GLOBAL, CONV, PLAIN = "#3b7dd8", "#f08a24", "#4caf7d", "#e4e7eb"
MAP_Y, STRIP_Y, PANEL_TOP, PANEL_BOTTOM = 8.0, 5.36, 4.62, 0.2
COLUMNS = (3.55, 6.55, 9.35, 11.75)
MAX_SIDE = 1.75

Shapes = dict[str, tuple[int, ...]]


def read_shapes(model: GCViT) -> Shapes:
    """Read the shape that each module returns for one image, without the batch, by name in the order of the calls."""
    shapes: Shapes = {}

    def keep(name: str, output: torch.Tensor) -> None:
        shapes[name] = tuple(output.shape[1:])

    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
    model.eval()(torch.empty(1, *model.input_size, device="meta"))
    return shapes


def describe_shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def describe_layer(module: nn.Module) -> str:
    """Describe a layer in the words of the figure, with its sizes."""
    match module:
        case nn.Conv2d():
            depthwise = ", depthwise" if module.groups > 1 else ""
            stride = f", stride {module.stride[0]}" if module.stride[0] > 1 else ""
            return f"{describe_shape(module.kernel_size)} convolution{depthwise}{stride}"
        case FusedBlock():
            return "fused block"
        case nn.LayerNorm():
            return "LayerNorm"
    return {"SqueezeExcite": "squeeze-excitation", "Mlp": "MLP"}[type(module).__name__]


def draw(model: GCViT, name: str) -> Figure:
    """Draw the whole figure of a model on meta."""
    rows = summarize(model)
    shapes = read_shapes(model)
    figure = Figure((WIDTH, HEIGHT), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    height, width = model.input_size[1:]
    total = f"{rows[-1].num_params / 1e6:.1f} M parameters, {rows[-1].gmacs:.2f} GMAC for {height} × {width} pixels"
    axes.text(0.35, 10.02, f"GC ViT: {name}", size=17, weight="bold", color=INK, va="center")
    axes.text(WIDTH - 0.35, 10.02, total, size=12, color=FAINT, ha="right", va="center")
    legend = f"Squares are maps, their lines windows; a sheet is {rows[1].width} channels."
    axes.text(0.35, 9.72, legend, size=9.5, color=FAINT, va="center")
    _draw_stages(axes, model, rows[1:-2], shapes)
    _draw_ends(axes, model, rows, shapes)
    _draw_panels(axes, model, shapes, rows[1:-2])
    return figure


# ---- the upper half: the way of the map ------------------------------------------------------------------------


def _draw_stages(axes: Axes, model: GCViT, rows: Sequence[Row], shapes: Shapes) -> None:
    for i, (x, row) in enumerate(zip(COLUMNS, rows, strict=True)):
        assert row.map_size is not None
        assert row.width is not None
        assert row.window is not None
        side = _map_side(rows, i)
        axes.text(x, 9.35, row.name, size=13, weight="bold", ha="center", color=INK)
        about = f"{row.num_params / 1e6:.2f} M, {row.gmacs:.2f} GMAC"
        axes.text(x, 9.13, about, size=9, ha="center", color=FAINT)
        num_sheets = row.width // (rows[0].width or 1)
        _draw_map(axes, x, MAP_Y, side, row.map_size, row.window, num_sheets)
        bottom = MAP_Y - MAX_SIDE / 2
        axes.text(x, bottom - 0.22, describe_shape((*row.map_size, row.width)), size=12, ha="center", color=INK)
        windows = f"{row.num_windows} windows of {row.window} × {row.window}" if row.num_windows != 1 else "one window"
        axes.text(x, bottom - 0.45, f"{windows}, {row.num_heads} heads", size=9.5, ha="center", color=INK)
        queries = shapes[f"stages.{i}.query_generator"]
        _draw_map(axes, x - 0.78, 6.13, 0.36, queries[:2], row.window, 1, GLOBAL)
        axes.text(x - 0.5, 6.2, "global queries", size=9.5, va="center", color=GLOBAL)
        axes.text(x - 0.5, 6.02, describe_shape(queries), size=9.5, va="center", color=GLOBAL)
        _draw_blocks(axes, model, i, x)


def _map_side(rows: Sequence[Row], stage: int) -> float:
    """Compute the side of a map in inches, by a root: in true proportion the last map would be a dot."""
    sides = [max(row.map_size or (1,)) for row in rows]
    return MAX_SIDE * (sides[stage] / sides[0]) ** 0.45


def _draw_map(
    axes: Axes, x: float, y: float, side: float, size: Sequence[int], window: int, num_sheets: int, colour: str = LOCAL
) -> None:
    """Draw a map around (x, y) with a line around each window, on a sheet for each multiple of the first width."""
    for sheet in range(num_sheets - 1, -1, -1):
        shift = 0.045 * (sheet - (num_sheets - 1) / 2)
        left, bottom = x - side / 2 + shift, y - side / 2 + shift
        face = matplotlib.colors.to_rgba(colour, 0.18)
        axes.add_patch(Rectangle((left, bottom), side, side, facecolor="white", edgecolor="none"))
        axes.add_patch(Rectangle((left, bottom), side, side, facecolor=face, edgecolor=colour, linewidth=0.9))
    for strong in (False, True):
        xs: list[float] = []
        ys: list[float] = []
        for axis, num in enumerate(size):
            for number in range(1, num):
                if (number % window == 0) == strong:
                    along, across = (0, side, nan), (side * number / num,) * 2 + (nan,)
                    xs += [left + x for x in (along if axis == 0 else across)]
                    ys += [bottom + side - y for y in (across if axis == 0 else along)]
        axes.plot(xs, ys, color=colour, lw=1.1 if strong else 0.12)  # one path: hundreds of lines make a large file


def _draw_blocks(axes: Axes, model: GCViT, stage: int, x: float) -> None:
    """Draw a bar for each block, and a line from the global queries to each block that uses them."""
    attentions = [module for module in model.stages[stage].modules() if isinstance(module, WindowAttention)]
    width = min(0.2, 1.95 / len(attentions))
    start = x - width * len(attentions) / 2
    bus, taken = STRIP_Y + 0.36, []
    for number, attention in enumerate(attentions):
        left = start + number * width
        colour = GLOBAL if attention.uses_global_queries else LOCAL
        _box(axes, (left + 0.012, STRIP_Y - 0.2), (width - 0.024, 0.4), colour, "none", rounding=0.03)
        if attention.uses_global_queries:
            _arrow(axes, (left + width / 2, bus), (left + width / 2, STRIP_Y + 0.21), GLOBAL, width=0.9, head=5)
            taken.append(left + width / 2)
    axes.plot((x - 0.78, x - 0.78), (5.95, bus), color=GLOBAL, lw=0.9)
    axes.plot((min(x - 0.78, *taken), max(x - 0.78, *taken)), (bus, bus), color=GLOBAL, lw=0.9)
    num_global = sum(attention.uses_global_queries for attention in attentions)
    about = f"{len(attentions)} blocks: {len(attentions) - num_global} local, {num_global} global"
    axes.text(x, STRIP_Y - 0.38, about, size=9.5, ha="center", va="center", color=INK)


def _draw_ends(axes: Axes, model: GCViT, rows: Sequence[Row], shapes: Shapes) -> None:
    stages = rows[1:-2]
    colours, *image = model.input_size
    _draw_map(axes, 1.15, MAP_Y, 1.45, (1, 1), 1, 1, FAINT)
    axes.text(1.15, 9.35, "image", size=13, weight="bold", ha="center", color=INK)
    axes.text(1.15, MAP_Y - MAX_SIDE / 2 - 0.22, describe_shape((*image, colours)), size=12, ha="center", color=INK)
    reach = [_map_side(stages, i) / 2 + 0.17 for i in range(len(stages))]
    ends = [1.15 + 1.45 / 2, *(x + far for x, far in zip(COLUMNS, reach, strict=True))]
    for i, (begin, end) in enumerate(zip(ends, (x - far for x, far in zip(COLUMNS, reach, strict=True)), strict=False)):
        part = rows[0] if i == 0 else next(part for part in stages[i].parts if part.name == "downsample")
        _arrow(axes, (begin + 0.05, MAP_Y), (end - 0.05, MAP_Y), CONV, width=2.2)
        middle = (begin + end) / 2
        axes.text(middle, MAP_Y + 0.1, part.name, size=9.5, ha="center", va="bottom", color=CONV)
        axes.text(middle, MAP_Y - 0.1, f"{part.num_params / 1e6:.2f} M", size=8.5, ha="center", va="top", color=FAINT)
    _arrow(axes, (ends[-1] + 0.05, MAP_Y), (13.15, MAP_Y), INK, width=2.2)
    axes.text(13.3, 9.35, "head", size=13, weight="bold", ha="center", color=INK)
    axes.text(13.3, 9.13, f"{rows[-2].num_params / 1e6:.2f} M", size=9, ha="center", color=FAINT)
    axes.add_patch(Rectangle((13.2, MAP_Y - 0.85), 0.2, 1.7, facecolor=PLAIN, edgecolor=INK, linewidth=0.9))
    under = MAP_Y - MAX_SIDE / 2 - 0.22
    axes.text(13.3, under, describe_shape(shapes["head"]), size=12, ha="center", color=INK)
    steps = f"LayerNorm,\naverage of\n{describe_shape(shapes['norm'][:2])},\nlinear"
    axes.text(13.3, under - 0.1, steps, size=9.5, ha="center", va="top", color=INK)


# ---- the lower half: what the parts consist of -----------------------------------------------------------------

PANELS = ("Downsample", "Fused block", "Query generator", "Local block", "Global block")
COLOURS = {"norm": PLAIN, "conv": CONV, "pool": "#c8e6d5", "local": LOCAL, "global": GLOBAL}
Steps = list[tuple[str, str]]
"""From top to bottom: a key of COLOURS for a box, "=" for a shape, "note" or "queries" for a remark, and "split" and
"+" for where a residual begins and ends; with the text."""


def _draw_panels(axes: Axes, model: GCViT, shapes: Shapes, rows: Sequence[Row]) -> None:
    width, gap = 2.5, 0.2
    panels = [
        _list_downsample(model, shapes),
        _list_fused(model, shapes),
        _list_generator(model, shapes),
        _list_block(model, shapes, 0),
        _list_block(model, shapes, 1),
    ]
    for i, (title, steps) in enumerate(zip(PANELS, panels, strict=True)):
        left = 0.35 + i * (width + gap)
        _box(axes, (left, PANEL_BOTTOM), (width, PANEL_TOP - PANEL_BOTTOM), "#f8f9fb", PLAIN, rounding=0.1)
        axes.text(left + 0.15, PANEL_TOP - 0.26, title, size=11.5, weight="bold", va="center", color=INK)
        _draw_steps(axes, left + width / 2, PANEL_TOP - 0.62, steps)
    size, window = rows[1].map_size, rows[1].window
    assert size is not None
    assert window is not None
    for i, is_global in ((3, False), (4, True)):
        _draw_example(axes, 0.35 + i * (width + gap), size, window, is_global)


def _list_children(model: GCViT, shapes: Shapes, prefix: str) -> Steps:
    """List the layers of a module in the order of their calls, with the map's shape if it changes."""
    steps, last = [], None
    for name, shape in shapes.items():
        if name.rpartition(".")[0] == prefix:
            layer = model.get_submodule(name)
            steps.append(("norm" if isinstance(layer, nn.LayerNorm) else "conv", describe_layer(layer)))
            if len(shape) == 3 and last not in (None, shape):
                steps.append(("=", describe_shape(shape)))
            last = shape
    return steps


def _list_downsample(model: GCViT, shapes: Shapes) -> Steps:
    name = "stages.1.downsample"
    before = [i + 1 for i, stage in enumerate(model.stages) if stage.downsample is not None]
    where = f"before stages {before[0]} to {before[-1]};\nin the stem too"
    return [("=", describe_shape(shapes[f"{name}.norm1"])), *_list_children(model, shapes, name), ("note", where)]


def _list_fused(model: GCViT, shapes: Shapes) -> Steps:
    name = "stages.1.downsample.fused"
    gates = model.get_submodule(f"{name}.squeeze_excite")
    assert isinstance(gates, SqueezeExcite)
    hidden = f"average, {gates.fc1.in_features} → {gates.fc1.out_features} → {gates.fc2.out_features}"
    depthwise, squeeze, pointwise = (step for step in _list_children(model, shapes, name) if step[0] == "conv")
    return [
        ("=", describe_shape(shapes[name])),
        ("split", ""),
        depthwise,
        ("note", "GELU"),
        squeeze,
        ("note", hidden),
        pointwise,
        ("+", ""),
        ("note", "in every downsample\nand query generator"),
    ]


def _list_generator(model: GCViT, shapes: Shapes) -> Steps:
    name = "stages.0.query_generator"
    maps = [shape for key, shape in shapes.items() if key.rpartition(".")[0] == f"{name}.fused"]
    steps = [("=", describe_shape(maps[0]))]
    # What follows a fused block is what the next one gets: where it is smaller, it was pooled.
    for before, after in zip(maps, [*maps[1:], shapes[name]], strict=True):
        steps += [("conv", "fused block")]
        steps += [("pool", "3 × 3 max pool, stride 2"), ("=", describe_shape(after))] if before != after else []
    numbers = ", ".join(str(model.get_submodule(f"stages.{i}.query_generator").num_poolings) for i in range(NUM_STAGES))
    return [*steps, ("note", f"poolings by stage: {numbers}")]


def _list_block(model: GCViT, shapes: Shapes, number: int) -> Steps:
    block = model.get_submodule(f"stages.1.blocks.{number}")
    assert isinstance(block, Block)
    attention = block.attention
    kind = "global" if attention.uses_global_queries else "local"
    made = "keys, values" if attention.uses_global_queries else "queries, keys, values"
    scale = "layer scale" if isinstance(block.scale1, LayerScale) else ""
    return [
        ("=", describe_shape(shapes[f"stages.1.blocks.{number}"])),
        ("split", ""),
        ("norm", "LayerNorm"),
        (kind, f"{attention.num_heads} heads within {attention.window} × {attention.window}"),
        ("note", f"{made} of its own"),
        *([("queries", "queries of the stage")] if attention.uses_global_queries else []),
        ("+", scale),
        ("split", ""),
        ("norm", "LayerNorm"),
        (kind, f"MLP, {block.mlp.fc1.out_features} wide"),
        ("+", scale),
    ]


def _draw_steps(axes: Axes, x: float, y: float, steps: Steps) -> None:
    split = y
    for kind, text in steps:
        if kind == "split":
            y -= 0.06
            split = y + 0.2
        elif kind == "+":
            y += 0.02
            right = x + 1.17
            axes.plot((x, right, right, x + 0.1), (split, split, y, y), color=FAINT, lw=0.9)
            axes.add_patch(Circle((x, y), 0.085, facecolor="white", edgecolor=INK, linewidth=0.9))
            axes.plot((x - 0.05, x + 0.05), (y, y), color=INK, lw=0.9)
            axes.plot((x, x), (y - 0.05, y + 0.05), color=INK, lw=0.9)
            axes.text(x - 0.2, y, text, size=8.5, ha="right", va="center", color=FAINT)
            y -= 0.3
        elif kind in COLOURS:
            _box(axes, (x - 1.0, y - 0.15), (2.0, 0.3), COLOURS[kind], "none", rounding=0.05)
            colour = INK if kind in ("norm", "pool") else "white"
            axes.text(x, y, text, size=9, ha="center", va="center", color=colour)
            y -= 0.36
        else:
            colour = GLOBAL if kind == "queries" else FAINT
            axes.text(x, y + 0.04, text, size=8.5, ha="center", va="top" if "\n" in text else "center", color=colour)
            y -= 0.27


def _draw_example(axes: Axes, left: float, size: Sequence[int], window: int, is_global: bool) -> None:
    """Draw the windows of a map at the bottom of a panel: one attends within itself, or all get the same queries."""
    side, y = 0.72, PANEL_BOTTOM + 0.47
    x = left + (1.95 if is_global else 0.65)
    _draw_map(axes, x, y, side, size, window, 1, LOCAL)
    if is_global:
        tile = left + 0.4
        _draw_map(axes, tile, y, 0.3, (window, window), window, 1, GLOBAL)
        for share in (-0.38, 0, 0.38):
            _arrow(axes, (tile + 0.2, y + 0.3 * share), (x - side / 2, y + side * share), GLOBAL, width=0.9)
        axes.text(left + 0.15, y - 0.3, "for all windows", size=8.5, va="center", color=FAINT)
        return
    across = side * window / size[1]
    corner = (x - side / 2 + across, y + side / 2 - 2 * across)
    axes.add_patch(Rectangle(corner, across, across, facecolor=LOCAL, edgecolor="none"))
    axes.text(x + side / 2 + 0.15, y, "each window\non its own", size=8.5, va="center", color=FAINT)


def _box(
    axes: Axes, corner: tuple[float, float], size: tuple[float, float], face: str, edge: str, *, rounding: float
) -> None:
    style = f"round,pad=0,rounding_size={rounding}"
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle=style, facecolor=face, edgecolor=edge))


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, *, width: float, head: float = 11
) -> None:
    arrow = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=head, color=colour, lw=width)
    arrow.shrinkA = arrow.shrinkB = 0
    axes.add_patch(arrow)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m docs.architecture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="gc_vit_tiny", choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=PICTURE, metavar="FILE", help=".svg or .png")
    arguments = parser.parse_args()
    with torch.device("meta"):
        model = create_model(arguments.model, attention="reference")
    # No date and no random names: the same model gives the same file.
    matplotlib.rcParams["svg.hashsalt"] = "gcvit"
    metadata = {"Date": None} if arguments.out.suffix == ".svg" else None
    draw(model, arguments.model).savefig(arguments.out, dpi=150, metadata=metadata)
    print(f"{arguments.out} is written")


if __name__ == "__main__":
    main()
