"""Export a run's weights for everybody: a safetensors file, its config.json and a model card, as timm's hub has them.

    python -m gcvit.export runs/demo-fsdp
    python -m gcvit.export runs/gc_vit_tiny --out /models/gc_vit_tiny --weights model

What is written, `timm.create_model("local-dir:DIR", pretrained=True)` loads with its classes, image size and how images
are prepared. Variants that timm has need nothing else (timm 1.0.31 or newer: older ones mix up the images of a batch);
for the others, and with --layout own, `import gcvit.model` comes first. `evaluate.py DIR` reads it too.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor

from gcvit.checkpoint import resolve, store
from gcvit.checkpoint.weights_source import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, choose_kind
from gcvit.config.load import parse_config
from gcvit.config.schema import Config, ModelConfig
from gcvit.errors import UserError
from gcvit.export.model_card import read_records, write_card
from gcvit.model import VARIANTS, layouts
from gcvit.model.fitting import HEAD
from gcvit.model.from_config import build_model
from gcvit.runtime.command_line import command_parser


def export(run: Path, out: Path | None = None, kind: str | None = None, layout: str | None = None) -> str:
    """Export the weights of a run folder (its best checkpoint) or of a checkpoint to the folder `out`.

    The folder is complete or absent.

    Args:
        run: The run folder or the checkpoint.
        out: By default RUN/export, or CHECKPOINT-export beside a checkpoint.
        kind: "ema" or "model"; by default the EMA if there is one.
        layout: "timm" or "own"; by default timm's if timm has the architecture.

    Returns:
        A message about the export and the call that loads it.

    Raises:
        UserError: An argument is impossible, and nothing is written; or the disk refuses the files.
    """
    found = store.open_checkpoint(resolve.find_checkpoint(run))
    config = parse_config(found.info["config"], source=str(found.path))
    kind = choose_kind(found, kind)
    timm_name = name_in_timm(config.model)
    if layout == "timm" and timm_name is None:
        raise UserError(
            "timm has no such architecture",
            got=f"{config.model.name} at {config.model.img_size} pixels"
            + (" with model.overrides" if config.model.overrides else ""),
            expected=", ".join(name for name in VARIANTS if _has_timm(name)) + ", at multiples of 32 pixels",
            hint="--layout own, which timm loads after `import gcvit.model`",
        )
    name = config.model.name if layout == "own" or timm_name is None else timm_name
    if out is None:
        out = run / "export" if found.path != run else run.resolve().with_name(f"{run.resolve().name}-export")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("something is there already", got=out, hint="give another --out, or move it away")
    tensors = store.read_tensors(found, kind)
    if name == timm_name:
        tensors = layouts.to_timm_state(tensors)
    classes, state = found.info.get("classes"), found.state
    records = read_records(found.path.parent.parent, kind, state)
    texts = {
        CONFIG_FILE: json.dumps(describe(config, name, classes), indent=2) + "\n",
        CARD_FILE: write_card(config, name, kind, state, records, classes),
    }
    origin = {"weights": kind, "step": str(state.step), "samples": str(state.samples)}
    if state.initial_weights is not None:
        origin["initial_weights"] = state.initial_weights
    _write(out, tensors, {"format": "pt", **origin, "config": json.dumps(_without_places(config))}, texts)
    first = "" if name == timm_name else "import gcvit.model; "
    return (
        f"{out}: {name}, {kind} of {found.path}\n"
        f'{first}timm.create_model("local-dir:{out}", pretrained=True) loads it, as does evaluate.py {out}'
    )


def name_in_timm(model: ModelConfig) -> str | None:
    """Return timm's own name of the architecture, or None if timm does not have it.

    timm's functions accept no other width or depth, and its model accepts no image whose windows are not whole.
    """
    is_alike = model.overrides is None and model.img_size % 32 == 0
    return _to_timm(model.name) if is_alike and _has_timm(model.name) else None


def describe(config: Config, name: str, classes: list[str] | None) -> dict[str, Any]:
    """Describe the architecture `name` as config.json for timm's hub; `classes` are in label order."""
    with torch.device("meta"):
        model = build_model(config.model)
    side, data = config.model.img_size, config.data
    is_own = name == config.model.name
    arguments = {"img_size": side}
    if is_own and config.model.overrides:
        arguments |= config.model.overrides.model_dump(mode="json", exclude_none=True)
    return {
        "architecture": name,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        **({"label_names": classes} if classes else {}),
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": model.num_classes,
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "pool_size": [side // 32, side // 32],
            "mean": list(data.mean),
            "std": list(data.std),
            "interpolation": "bicubic",
            "crop_pct": data.crop_pct,
            "crop_mode": "squash" if data.eval_resize == "squash" else "center",
            "first_conv": "stem.conv" if is_own else layouts.to_timm("stem.conv.").rstrip("."),
            "classifier": HEAD.rstrip("."),
        },
    }


def _without_places(config: Config) -> dict[str, Any]:
    """Convert the config to plain values, without folders of the machine it ran on."""
    data = config.data.model_copy(update={"dir": None, "cache_dir": None})
    return config.model_copy(update={"data": data, "output_dir": "runs"}).model_dump(mode="json")


def _to_timm(name: str) -> str:
    return name.replace("gc_vit_", "gcvit_")


def _has_timm(name: str) -> bool:
    return bool(timm.is_model(_to_timm(name)))


def _write(out: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], texts: Mapping[str, str]) -> None:
    out = out.resolve()
    part = out.with_name(f"{out.name}.tmp")
    try:
        shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
        part.mkdir(parents=True)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        # Not by save_file, whose file nobody else may read.
        (part / WEIGHTS_FILE).write_bytes(safetensors.torch.save(contiguous, metadata))
        for file, text in texts.items():
            (part / file).write_text(text)
        for path in (part / WEIGHTS_FILE, *(part / file for file in texts), part):
            store.sync(path)
        part.rename(out)  # also onto an empty folder
        store.sync(out.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError("cannot write the export", got=f"{out} ({error})", hint="give another --out") from None


def main() -> None:
    parser = command_parser("gcvit.export", "RUN_OR_CHECKPOINT [flags]", __doc__)
    add = parser.add_argument_group("what, and where to").add_argument
    add("run", metavar="RUN_OR_CHECKPOINT", type=Path, help="runs/TAG (its best) or a checkpoint in it")
    add("--weights", choices=["ema", "model"], help="which ones (ema where there is one)")
    add("--out", metavar="DIR", type=Path, help="folder to make (RUN/export, or CHECKPOINT-export)")
    add = parser.add_argument_group("how").add_argument
    add("--layout", choices=["timm", "own"], help="names of tensors (timm's where timm has the model)")
    arguments = parser.parse_args()
    print(export(arguments.run, arguments.out, arguments.weights, arguments.layout), flush=True)
