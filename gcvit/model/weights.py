"""Convert weights between files and models, and between the official layout, timm's and ours.

    python -m gcvit.model.weights convert gcvit_1k_tiny.pth.tar gcvit_tiny.safetensors --to timm
    python -m gcvit.model.weights convert runs/gc_vit_tiny/export/model.safetensors tiny.pth.tar --to official

Which variant a file is of is read from its shapes, whatever its class count and windows. The tensors are copied bit by
bit, the averaged ones where a file has both; what else a checkpoint holds (optimizer, epoch, ...) is left out.
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from gcvit.errors import UserError
from gcvit.model.fitting import BIAS_TABLE, HEAD, StateDict, fit, window_of
from gcvit.model.gcvit import NUM_STAGES, GCViT
from gcvit.model.layouts import (
    LAYOUTS,
    find_layout,
    foreign_file,
    load,
    read,
    read_fitting,
    to_official,
    to_official_state,
    to_ours,
    to_timm,
    to_timm_state,
)
from gcvit.model.variants import VARIANTS, create_model, find_variant
from gcvit.runtime.atomic_write import atomic_path
from gcvit.runtime.command_line import command_parser
from gcvit.runtime.entrypoint import run_main

__all__ = [
    "HEAD",
    "LAYOUTS",
    "convert",
    "identify",
    "load",
    "read",
    "read_fitting",
    "read_model",
    "to_official",
    "to_official_state",
    "to_timm",
    "to_timm_state",
]

CONVERTERS: dict[str, Callable[[Mapping[str, Tensor]], StateDict]] = {
    "official": to_official_state,
    "timm": to_timm_state,
    "gcvit": dict,
}
SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".pt")


def convert(source: Path, target: Path, layout: str, name: str | None = None) -> str:
    """Write a file's weights in a layout of `CONVERTERS`, and describe the source and the target.

    The official layout stores the tensors under "state_dict", as published. Safetensors files and the other layouts
    have bare tensors. The target is complete or absent.

    Args:
        name: As in `read_model`.

    Raises:
        UserError: The source is no GC ViT, or the target exists already or cannot be written.
    """
    if not target.name.endswith(SUFFIXES):
        raise UserError("unknown kind of weights file", got=target, expected=", ".join(f"*{end}" for end in SUFFIXES))
    if target.exists():
        raise UserError("something is there already", got=target, hint="give another name, or move it away")
    model, _, found = read_model(source, name)
    # Copied, since tensors of a file may be views of one storage, which would be written whole with each of them.
    tensors = {key: tensor.clone().contiguous() for key, tensor in CONVERTERS[layout](model.state_dict()).items()}
    _write(target, tensors, layout)
    return f"{found}\n{target}: {layout} layout, {len(tensors)} tensors"


def read_model(path: str | Path, name: str | None = None, **overrides: Any) -> tuple[GCViT, str, str]:
    """Build the model of a file with its weights.

    Args:
        name: The variant; by default read from the shapes.
        overrides: Arguments of `create_model`.

    Returns:
        The model, its variant, and a line about the file.

    Raises:
        UserError: The file is no GC ViT, or not of one of the variants.
    """
    checkpoint, container = read(path)
    arguments = identify(checkpoint, path, name) | overrides
    with torch.device("meta"):
        model = create_model(**arguments)
    state, _ = fit(to_ours(checkpoint, model), model, path)
    model.load_state_dict(state, assign=True)
    found = f"{path}: {find_layout(checkpoint, model)} layout, {container}, {len(state)} tensors"
    name = arguments["name"]
    return model, name, f"{found}, {name} of {model.num_classes} classes at {model.img_size} pixels"


def identify(checkpoint: Mapping[str, Tensor], path: str | Path, name: str | None = None) -> dict[str, Any]:
    """Infer the arguments of `create_model` from the tensors of a file in any layout.

    The width and the depths determine the variant unless `name` gives it. The bias tables determine the image size:
    windows are rounded up, so several sizes have the same windows, of which the largest is returned.

    Raises:
        UserError: The tensors are of no GC ViT, or of no variant.
    """

    def find_shape(ours: str, num_axes: int) -> torch.Size | None:
        found = (checkpoint[name].shape for translate in LAYOUTS.values() if (name := translate(ours)) in checkpoint)
        return next((shape for shape in found if len(shape) == num_axes), None)

    stem, head = find_shape("stem.conv.weight", 4), find_shape(HEAD + "weight", 2)
    tables = [find_shape(f"stages.{i}.blocks.0{BIAS_TABLE}", 2) for i in range(NUM_STAGES)]
    windows = tuple(window_of(table) for table in tables if table is not None)
    if stem is None or len(windows) < NUM_STAGES:
        raise foreign_file(checkpoint, path)
    depths = tuple(
        next(j for j in itertools.count() if find_shape(f"stages.{i}.blocks.{j}.norm1.weight", 1) is None)
        for i in range(NUM_STAGES)
    )
    if name is None:
        alike = [name for name, row in VARIANTS.items() if (row.width, row.depths) == (stem[0], depths)]
        if not alike:
            raise UserError(
                f"{path} is of no known variant",
                got=f"width {stem[0]}, depths {list(depths)}",
                expected=", ".join(VARIANTS),
                hint="name the variant (--model NAME); a run of ours with overrides is exported by python -m "
                "gcvit.export, and the export folder says how its model is built",
            )
        name = next((name for name in alike if VARIANTS[name].windows == windows), alike[0])
    row = find_variant(name)
    return {
        "name": name,
        "num_classes": 0 if head is None else head[0],
        "img_size": min(window * row.img_size // own for window, own in zip(windows, row.windows, strict=True)),
        "in_chans": stem[1],
    }


def _write(target: Path, tensors: StateDict, layout: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as part:
            if target.suffix == ".safetensors":
                part.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))  # save_file denies others access
            else:
                torch.save({"state_dict": tensors} if layout == "official" else tensors, part)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch raises RuntimeError for a full disk
        raise UserError("cannot write the weights", got=f"{target} ({error})", hint="give another place") from None


def main() -> None:
    parser = command_parser("gcvit.model.weights", "convert SRC DST --to LAYOUT [flags]", __doc__)
    add = parser.add_argument_group("what, and where to").add_argument
    add("command", choices=["convert"], metavar="convert", help="write weights in another layout")
    add("source", metavar="SRC", type=Path, help="weights in any layout")
    add("target", metavar="DST", type=Path, help=f"file to make: {', '.join(SUFFIXES)}")
    add("--to", required=True, choices=CONVERTERS, help="the layout of names")
    add("--model", metavar="NAME", help="the variant (read from the shapes)")
    arguments = parser.parse_args()
    print(convert(arguments.source, arguments.target, arguments.to, arguments.model), flush=True)


if __name__ == "__main__":
    run_main(main)
