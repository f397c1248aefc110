"""Summarize a GC ViT: its stages with their parameters, multiply-adds, activations and windows.

    python -m gcvit.model.summary gc_vit_tiny
    python -m gcvit.model.summary gc_vit_large --img-size 384 --json
    python -m gcvit.model.summary gc_vit_tiny --attention cat.jpg --checkpoint gcvit_1k_tiny.pth.tar --out cat.png

With --attention it draws where a picture's attention goes, see `gcvit.model.attention_maps`. Everything else is counted
on a model without memory: any size takes seconds. Each row is counted by itself, and the last one on the whole model.
"""

import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from gcvit.errors import UserError
from gcvit.model.attention import WindowAttention
from gcvit.model.gcvit import GCViT
from gcvit.model.variants import VARIANTS, create_model
from gcvit.runtime.command_line import command_parser
from gcvit.runtime.entrypoint import run_main


@dataclass(frozen=True)
class Row:
    """Hold the numbers of one part of the model. The row of a part includes those of its `parts`."""

    name: str
    num_params: int
    gmacs: float
    """10^9 multiply-adds of the forward pass of an image, in matrix products and convolutions."""
    activations: int
    """Values that the reference attention keeps for one image's backward pass, without activation checkpointing."""
    map_size: tuple[int, int] | None = None
    """The height and width in positions; None without a map."""
    width: int | None = None
    """The number of channels of the map."""
    depth: int | None = None
    """The number of blocks. Even ones attend locally, odd ones with the global queries."""
    num_heads: int | None = None
    window: int | None = None
    """The side of a window, in positions."""
    num_windows: int | None = None
    """The number of windows of an image."""
    parts: tuple["Row", ...] = ()
    """The rows of a stage: its downsampler, its query generator, its blocks together."""


def summarize(model: GCViT) -> list[Row]:
    """Compute a row for the stem, each stage, the head and the whole model, which is on the meta device."""
    names = [*model.cut_points(), "norm", "head"]
    modules = {name: model.get_submodule(name) for name in names}
    image = torch.empty(1, *model.input_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.eval()(image)
    flops = {name: sum(of_module.values()) for name, of_module in counter.get_flop_counts().items()}
    with count_activations(modules) as activations:
        model.train()(image)

    def count(row: str, *prefixes: str, **about: Any) -> Row:
        """Sum over the modules whose names begin with the prefix."""
        of_row = [name for name in names if name.startswith(prefixes)]
        num_params = sum(p.numel() for name in of_row for p in modules[name].parameters())
        gmacs = sum(flops.get(f"{type(model).__name__}.{name}", 0) for name in of_row) / 2e9
        return Row(row, num_params, gmacs, sum(activations[name] for name in of_row), **about)

    size, num_channels = _describe_map(model, 0)
    rows = [count("stem", "stem", map_size=size, width=num_channels)]
    for i, stage in enumerate(model.stages):
        attentions = [module for module in stage.modules() if isinstance(module, WindowAttention)]
        size, num_channels = _describe_map(model, i)
        window = attentions[0].window
        parts = {
            "downsample": f"stages.{i}.downsample",
            "queries": f"stages.{i}.query_",
            "blocks": f"stages.{i}.blocks.",
        }
        about = {
            "map_size": size,
            "width": num_channels,
            "depth": len(attentions),
            "num_heads": attentions[0].num_heads,
            "window": window,
            "num_windows": math.ceil(size[0] / window) * math.ceil(size[1] / window),
            "parts": tuple(count(row, prefix) for row, prefix in parts.items() if i or row != "downsample"),
        }
        rows.append(count(f"stage {i + 1}", f"stages.{i}.", **about))
    rows.append(count("head", "norm", "head", width=model.num_features))
    num_params = sum(p.numel() for p in model.parameters())
    return [*rows, Row("all", num_params, flops["Global"] / 2e9, sum(activations.values()))]


def _describe_map(model: GCViT, stage: int) -> tuple[tuple[int, int], int]:
    """Return the height, width and channels of a stage's map."""
    about, (_, height, width) = model.feature_info[stage], model.input_size
    reduction = about["reduction"]
    return (math.ceil(height / reduction), math.ceil(width / reduction)), about["num_chs"]


@contextmanager
def count_activations(parts: dict[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Count the values that autograd stores for backward in the block, by part; "" is outside all parts.

    A tensor that several operations store counts once, for the part that stores it first. Parameters do not count.
    """
    counts = dict.fromkeys([*parts, ""], 0)
    inside = [""]
    # The address of a storage identifies it, as long as the storage is in `kept`.
    seen = {p.untyped_storage()._cdata for part in parts.values() for p in part.parameters()}
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept.append(storage)
            counts[inside[-1]] += storage.nbytes() // tensor.element_size()
        return tensor

    hooks = [part.register_forward_pre_hook(partial(_enter, inside, name)) for name, part in parts.items()]
    hooks += [part.register_forward_hook(partial(_leave, inside)) for part in parts.values()]
    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _enter(inside: list[str], name: str, *_: Any) -> None:
    inside.append(name)


def _leave(inside: list[str], *_: Any) -> None:
    inside.pop()


def format_table(rows: list[Row]) -> str:
    """Format the rows for a terminal."""
    titles = f"{'':12} {'map':>9} {'width':>6} {'depth':>6} {'heads':>6} {'windows':>16} {'params':>11} {'GMAC':>8} "
    lines = [f"{titles}{'kept':>9}"]
    for row in itertools.chain.from_iterable((row, *row.parts) for row in rows):
        sides = "" if row.map_size is None else "{} x {}".format(*row.map_size)
        windows = "" if row.window is None else f"{row.num_windows} of {row.window} x {row.window}"
        name = row.name if row in rows else f"  {row.name}"
        lines.append(
            f"{name:12} {sides:>9} {row.width or '':>6} {row.depth or '':>6} {row.num_heads or '':>6} {windows:>16} "
            f"{row.num_params:>11,} {row.gmacs:>8.3f} {row.activations / 1e6:>7.2f} M"
        )
    kept = "values for one image's backward pass, all in fp32, by the reference attention, without recomputing"
    return "\n".join([*lines, f"kept: {kept}"])


def main() -> None:
    parser = command_parser("gcvit.model.summary", "NAME [flags]", __doc__)
    add = parser.add_argument_group("the model").add_argument
    add("name", metavar="NAME", help=f"one of {', '.join(VARIANTS)}")
    add("--img-size", type=int, nargs="+", metavar="N", help="a side in pixels, or height and width (its own)")
    add("--num-classes", type=int, metavar="N", help="width of the head; 0 is none (1000)")
    add("--json", action="store_true", help="the table for machines")
    add = parser.add_argument_group("instead of a table").add_argument
    add("--attention", type=Path, metavar="IMAGE", help="draw where this picture's attention goes")
    add("--checkpoint", metavar="FILE|NAME", help="... with these weights (the published ones)")
    add("--out", type=Path, metavar="PNG", help="... into this file (attention.png)")
    arguments = parser.parse_args()
    draws = arguments.attention is not None
    ignored = ("img_size", "num_classes", "json") if draws else ("checkpoint", "out")
    given = [
        f"--{option.replace('_', '-')}"
        for option in ignored
        if getattr(arguments, option) != parser.get_default(option)
    ]
    if given:
        hint = "leave them out: the weights say it" if draws else "add --attention IMAGE"
        kind = "drawing" if draws else "table"
        raise UserError(f"options that the {kind} has no use for", got=", ".join(given), hint=hint)
    if draws:
        from gcvit.model.attention_maps import draw_file

        out = arguments.out or Path("attention.png")
        print(draw_file(arguments.attention, arguments.name, arguments.checkpoint, out))
        return
    sides = arguments.img_size
    num_classes = 1000 if arguments.num_classes is None else arguments.num_classes
    if num_classes < 0:
        raise UserError("--num-classes", got=num_classes, expected="0 (no head) or more")
    with torch.device("meta"):
        model = create_model(
            arguments.name,
            num_classes=num_classes,
            img_size=sides[0] if sides and len(sides) == 1 else sides,
            attention="reference",
        )
    rows = summarize(model)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    variant, (_, height, width) = VARIANTS[arguments.name], model.input_size
    published = f"{variant.published_gmacs} GMAC, top-1 {variant.published_top1} % at {variant.img_size}"
    print(f"{arguments.name} at {height} x {width} (published: {published})\n{format_table(rows)}")


if __name__ == "__main__":
    run_main(main)
