"""Read weights files of three layouts, the official, timm's and ours, for a model.

Our layout is a GCViT's `state_dict`. `to_official` and `to_timm` convert one of our names to the name there. That one
direction is enough, since a model lists its own names. The squeeze-excitation weights are matrices here and in the
official layout, and 1x1 convolutions in timm's.
"""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from gcvit.errors import UserError
from gcvit.model.fitting import BIAS_TABLE, HEAD, StateDict, fit, resample_bias_tables, window_of

if TYPE_CHECKING:
    from gcvit.model.gcvit import GCViT

# The keys of the tensors in trainers' checkpoints. The average comes first, since it is the one that was published.
CONTAINERS = ("state_dict_ema", "state_dict", "model")
WRAPPER_PREFIX = re.compile(r"^(module\.|_orig_mod\.)+")

OFFICIAL_PARTS = (
    ("stem.conv.", "patch_embed.proj."),
    ("stem.downsample.", "patch_embed.conv_down."),
    ("stages.", "levels."),
    ("query_generator.fused.", "q_global_gen.to_q_global."),
    (".fused.", "."),
    (".depthwise.", ".conv.0."),
    (".squeeze_excite.fc1.", ".conv.2.fc.0."),
    (".squeeze_excite.fc2.", ".conv.2.fc.2."),
    (".pointwise.", ".conv.3."),
    (".attention.bias_table", ".attn.relative_position_bias_table"),
    (".attention.", ".attn."),
    (".scale1.gamma", ".gamma1"),
    (".scale2.gamma", ".gamma2"),
    (HEAD, "head."),
)
TIMM_PARTS = (
    ("stem.conv.", "stem.conv1."),
    ("stem.downsample.", "stem.down."),
    (".fused.", ".conv_block."),
    (".depthwise.", ".conv_dw."),
    (".squeeze_excite.", ".se."),
    (".pointwise.", ".conv_pw."),
    (".attention.bias_table", ".attn.rel_pos.relative_position_bias_table"),
    (".attention.", ".attn."),
    (".scale1.", ".ls1."),
    (".scale2.", ".ls2."),
)


def to_official(name: str) -> str:
    """Return the official name of our parameter `name`."""
    # The official model downsamples at the end of a stage, ours at the start of the next.
    name = re.sub(r"^stages\.(\d+)\.downsample", lambda match: f"stages.{int(match[1]) - 1}.downsample", name)
    return _replace_parts(name, OFFICIAL_PARTS)


def to_timm(name: str) -> str:
    """Return timm's name of our parameter `name`."""
    # timm counts the query generator's blocks from one.
    query_block = r"\.query_generator\.fused\.(\d+)"
    name = re.sub(query_block, lambda match: f".global_block.blocks.conv{int(match[1]) + 1}", name)
    return _replace_parts(re.sub(r"^norm\.", "stages.3.norm.", name), TIMM_PARTS)


def _replace_parts(name: str, parts: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in parts:
        name = name.replace(ours, theirs)
    return name


LAYOUTS: dict[str, Callable[[str], str]] = {"gcvit": str, "official": to_official, "timm": to_timm}


def to_official_state(state: Mapping[str, Tensor]) -> StateDict:
    """Convert our `state_dict` to the official layout, with the index buffers of its bias tables."""
    official = {}
    for name, tensor in state.items():
        official[to_official(name)] = tensor
        if name.endswith(BIAS_TABLE):
            index_name = to_official(name).replace("_bias_table", "_index")
            official[index_name] = relative_position_index(window_of(tensor.shape))
    return official


def to_timm_state(state: Mapping[str, Tensor]) -> StateDict:
    """Convert our `state_dict` to timm's layout."""
    return {
        to_timm(name): tensor[:, :, None, None] if ".squeeze_excite." in name else tensor
        for name, tensor in state.items()
    }


def relative_position_index(window: int) -> Tensor:
    """Compute the bias table's row of every (query, key) pair of a window, (N, N), as in the official layout."""
    y, x = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)
    rows = (y[:, None] - y[None, :] + window - 1) * (2 * window - 1)
    return rows + (x[:, None] - x[None, :] + window - 1)


def load(
    model: "GCViT", path: str | Path, strict: bool = True, reset_head: bool = False, resample: bool = False
) -> str:
    """Load weights from a checkpoint or safetensors file into a whole model, and describe them.

    Raises:
        UserError: As in `read_fitting`.
    """
    assert not any(parameter.is_meta for parameter in model.parameters()), "nothing can be loaded on meta"
    state, description = read_fitting(model, path, strict, reset_head, resample)
    model.load_state_dict(state, strict=False)  # read_fitting was strict, and says more
    return description


def read_fitting(
    model: "GCViT", path: str | Path, strict: bool = True, reset_head: bool = False, resample: bool = False
) -> tuple[StateDict, str]:
    """Read a file's whole tensors, in any of the three layouts, to the CPU under the names of `model`.

    The arguments are those of `fit`.

    Returns:
        The tensors, and a line about them.

    Raises:
        UserError: The file is missing or no checkpoint, or its tensors do not fit; see `fit`.
    """
    checkpoint, container = read(path)
    layout = find_layout(checkpoint, model)
    if layout is None:
        raise foreign_file(checkpoint, path)
    state, changes = fit(to_ours(checkpoint, model), model, path, strict, reset_head, resample)
    return state, ", ".join([f"{path}: {layout} layout", container, f"{len(state)} tensors", *changes])


def foreign_file(checkpoint: Mapping[str, Any], path: str | Path) -> UserError:
    """Return the error to raise for a file whose tensors are not a GC ViT's."""
    return UserError(
        f"{path} holds no GC ViT",
        got="tensors " + ", ".join(list(checkpoint)[:3]) + ", ...",
        expected="the official layout, timm's, or an export of this project",
    )


def to_fitting(checkpoint: Mapping[str, Any], model: "GCViT") -> StateDict:
    """Convert a checkpoint's tensors to our names and the model's windows. timm calls it before it loads them."""
    state = to_ours(checkpoint, model)
    resample_bias_tables(state, {name: law.shape for name, law in model.initial_laws.items()})
    return state


def read(path: str | Path) -> tuple[StateDict, str]:
    """Read the tensors of a file under its own names, without running any code of the file.

    Returns:
        The tensors, and their place in the file in words.

    Raises:
        UserError: The file is missing, cannot be read safely, or has no named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("no such weights file", got=path, expected="a .pth, .pt, .pth.tar or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            # timm's and the official trainer leave their arguments in the checkpoint; a Namespace is inert.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file makes the readers raise nearly anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is not a checkpoint that can be read safely", got=reason) from error
    tensors, container = find_tensors(content) if isinstance(content, dict) else ({}, "")
    if not tensors:
        raise UserError(f"{path} holds no named tensors", got=type(content).__name__)
    return tensors, container


def find_tensors(content: Mapping[str, Any]) -> tuple[StateDict, str]:
    """Find the named tensors in a checkpoint's content, without prefixes of wrappers, and their place in it."""
    container = next((key for key in CONTAINERS if isinstance(content.get(key), dict)), None)
    tensors = content if container is None else content[container]
    named = {WRAPPER_PREFIX.sub("", str(name)): value for name, value in tensors.items() if isinstance(value, Tensor)}
    return named, container or "bare tensors"


def find_layout(checkpoint: Mapping[str, Any], model: "GCViT") -> str | None:
    """Return the layout ("gcvit", "official" or "timm") that the names fit best; None if most fit none."""
    num_matches = {
        layout: sum(translate(ours) in checkpoint for ours in model.initial_laws)
        for layout, translate in LAYOUTS.items()
    }
    best = max(num_matches, key=lambda layout: num_matches[layout])
    # Against the shorter list, so that a deeper or shallower GC ViT is still told apart from another network.
    return best if 2 * num_matches[best] > min(len(model.initial_laws), len(checkpoint)) else None


def to_ours(checkpoint: Mapping[str, Any], model: "GCViT") -> StateDict:
    """Rename a checkpoint's tensors to our names; unknown ones keep theirs."""
    tensors, _ = find_tensors(checkpoint)
    translate = LAYOUTS[find_layout(tensors, model) or "gcvit"]
    names = {translate(ours): ours for ours in [*model.initial_laws, HEAD + "weight", HEAD + "bias"]}
    state = {}
    for theirs, tensor in tensors.items():
        if theirs.endswith("relative_position_index"):
            continue  # follows from the window
        ours = names.get(theirs, theirs)
        state[ours] = tensor.flatten(1) if ".squeeze_excite." in ours else tensor
    return state
