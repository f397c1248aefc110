"""Fit weights to a model: replace the head, and resample the bias tables of other windows.

Names are ours, see `gcvit.model.weights`; the weights may come from a file or from a checkpoint of a run.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from gcvit.errors import UserError

if TYPE_CHECKING:
    from gcvit.model.gcvit import GCViT

StateDict = dict[str, Tensor]

HEAD = "head.fc."
BIAS_TABLE = ".attention.bias_table"
# In any of the layouts: what the model lacks keeps the file's name.
QUERY_BLOCK = re.compile(
    r"^(?:stages|levels)\.(\d+)\."
    r"(?:query_generator\.fused\.|q_global_gen\.to_q_global\.|global_block\.blocks\.conv)(\d+)\."
)


def fit(
    state: Mapping[str, Tensor],
    model: "GCViT",
    source: str | Path,
    strict: bool = True,
    reset_head: bool = False,
    resample: bool = False,
) -> tuple[StateDict, list[str]]:
    """Rename and resample whole tensors so that they fit `model`, and describe the changes.

    The model may be on meta or sharded.

    Args:
        state: Whole tensors under our names.
        source: The origin of the tensors, for messages.
        strict: The tensors must be every parameter and nothing else.
        reset_head: Leave the head out.
        resample: Resample bias tables of other windows to the model's.

    Returns:
        The tensors that fit, and the changes in words.

    Raises:
        UserError: The tensors are of another model, of other windows or poolings, or of another number of classes.
    """
    state, changes = dict(state), []
    shapes = {name: law.shape for name, law in model.initial_laws.items()}
    if resample:
        changes += resample_bias_tables(state, shapes)
    if reset_head:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(HEAD)}
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(HEAD)}
        changes.append("without its head")
    check_fit(state, shapes, source, strict)
    return state, changes


def resample_bias_tables(state: StateDict, shapes: Mapping[str, torch.Size]) -> list[str]:
    """Resample bias tables of other windows to these shapes, in place, and return a description."""
    changed = set()
    for name, shape in shapes.items():
        table = state.get(name)
        if table is None or not has_other_window(name, table.shape, shapes):
            continue
        state[name] = resample_bias_table(table, window_of(shape))
        changed.add((window_of(table.shape), window_of(shape)))
    pairs = " and ".join(f"{old} -> {new}" for old, new in sorted(changed))
    return [f"bias tables resampled {pairs}"] if changed else []


def resample_bias_table(table_lh: Tensor, window: int) -> Tensor:
    """Resample a relative-position bias table ((2v-1)^2, h) to windows of another side, ((2w-1)^2, h), in its dtype.

    Bicubic over the square of offsets, as Swin (Liu et al., ICCV 2021) goes from 224 to 384 pixels: a window
    then shows the same share of an image in finer positions, so offsets stay at the same place in it.
    """
    side, old_side = 2 * window - 1, 2 * window_of(table_lh.shape) - 1
    dtype = torch.promote_types(table_lh.dtype, torch.float32)
    table_hyx = table_lh.to(dtype).T.reshape(1, -1, old_side, old_side)
    table_hyx = F.interpolate(table_hyx, size=(side, side), mode="bicubic", align_corners=False)
    return table_hyx.reshape(-1, side**2).T.to(table_lh.dtype).contiguous()


def window_of(table_shape: torch.Size) -> int:
    """Return the side of the window that a bias table of this shape, ((2w-1)^2, heads), is for."""
    return (math.isqrt(table_shape[0]) + 1) // 2


def windows_of(shapes: Mapping[str, torch.Size]) -> list[int]:
    """Return the window of each stage, from the bias table of its first block."""
    return [window_of(shape) for name, shape in shapes.items() if name.endswith(".blocks.0" + BIAS_TABLE)]


def has_other_window(name: str, shape: torch.Size, shapes: Mapping[str, torch.Size]) -> bool:
    """Return whether a parameter of this shape is a bias table of the model, but for other windows."""
    if not name.endswith(BIAS_TABLE) or name not in shapes or shape[1:] != shapes[name][1:]:
        return False
    return shape != shapes[name] and shape[0] == (2 * window_of(shape) - 1) ** 2


def count_query_blocks(names: Iterable[str]) -> list[int]:
    """Count the fused blocks of each stage's query generator."""
    blocks = {match.groups() for name in names if (match := QUERY_BLOCK.match(name))}
    return list(Counter(stage for stage, _ in sorted(blocks)).values())


def check_fit(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], source: str | Path, strict: bool) -> None:
    """Check that the tensors have these shapes and, with `strict`, exactly these names.

    Raises:
        UserError: They do not.
    """
    problems = {
        name: f"{name} is {tuple(tensor.shape)} and not {tuple(shapes[name])}"
        for name, tensor in state.items()
        if name in shapes and tensor.shape != shapes[name]
    }
    if strict:
        problems |= {name: f"{name} is missing" for name in shapes if name not in state}
        problems |= {name: f"{name} is unknown" for name in state if name not in shapes}
    if not problems:
        return
    found = {name: tensor.shape for name, tensor in state.items()}
    others = [name for name in problems if not name.startswith(HEAD)]
    if not others:
        weight = HEAD + "weight"
        raise UserError(
            f"{source} has another number of classes than the model",
            got=found[weight][0] if weight in found else "no head",
            expected=shapes[weight][0] if weight in shapes else "no head",
            hint="build the model with that num_classes, or let its head start afresh (reset_head)",
        )
    others = [name for name in others if not (name in found and has_other_window(name, found[name], shapes))]
    if not others:
        raise UserError(
            f"{source} has other windows than the model",
            got=windows_of(found),
            expected=windows_of(shapes),
            hint="build the model with those windows, or let the bias tables be resampled (resample)",
        )
    if all(QUERY_BLOCK.match(name) for name in others) and count_query_blocks(found) != count_query_blocks(shapes):
        raise UserError(
            f"{source} pools its global queries another number of times than the model",
            got=f"{count_query_blocks(found)} fused blocks",
            expected=count_query_blocks(shapes),
            hint="let the windows grow with img_size, or build the model for the file's img_size and let it take "
            "images of any (dynamic_img_size)",
        )
    more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise UserError(
        f"{source} is of another model",
        got=", ".join(list(problems.values())[:3]) + more,
        hint="build the variant, img_size and overrides that the file was trained with",
    )
