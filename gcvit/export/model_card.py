"""Write the model card of an export, README.md as Hugging Face's hub reads it, with the origin of the weights.

A card states only known facts: numbers are counted on the model, or read from the checkpoint or from the records of
`evaluate.py` beside the run. The owner of the weights chooses their licence; only the published weights have one.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData

import gcvit
from gcvit.checkpoint.store import RunState
from gcvit.checkpoint.weights_source import PUBLISHED
from gcvit.config.schema import AugmentConfig, Config
from gcvit.model.from_config import build_model
from gcvit.model.summary import summarize

PAPER = "https://arxiv.org/abs/2206.09959"
LICENCE = "cc-by-nc-sa-4.0"
"""The licence of the published weights, and of all weights that are made from them."""

Record = Mapping[str, Any]
"""A record of `evaluate.py` about an evaluation, see docs/evaluation.md."""


def read_records(run: Path, kind: str, state: RunState) -> list[Record]:
    """Read the records of `evaluate.py` for the weights of one kind at one step of a run; skip files without one."""
    records = []
    for path in sorted((run / "evaluations").glob("*.json")):
        try:
            record = json.loads(path.read_text())
            weights = record["weights"], record["checkpoint"]["step"]
            numbers = [float(record["result"][name]) for name in ("top1", "top5", "ece", "num_samples")]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if weights == (kind, state.step) and numbers[-1]:
            records.append(record)
    return records


def write_card(
    config: Config, name: str, kind: str, state: RunState, records: Sequence[Record], classes: Sequence[str] | None
) -> str:
    """Write the card of the weights of one kind ("ema" or "model") at a step; `name` is the exported architecture's."""
    sections = {
        "The model": _describe_model(config),
        "Use": _describe_use(config, name, classes),
        "Results": _describe_results(config, kind, state, records),
        "Training": _describe_training(config, kind, state),
        "Licence": _describe_licence(state),
        "Citation": _CITATION,
    }
    head = f"---\n{_write_head(config, state, records)}\n---\n\n# {config.tag}\n\n"
    what = f"A GC ViT image classifier ([paper]({PAPER})), trained and exported by gcvit {gcvit.__version__}.\n"
    return head + what + "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())


def _write_head(config: Config, state: RunState, records: Sequence[Record]) -> str:
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=str(record["name"]),
            dataset_name=str(record["name"]),
            metric_type="accuracy",
            metric_name=metric,
            metric_value=record["result"][key],
        )
        for record in records
        for metric, key in (("top-1 (%)", "top1"), ("top-5 (%)", "top5"))
    ]
    data = ModelCardData(
        license=LICENCE if is_published(state) else None,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "gcvit"],
        model_name=config.tag if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def is_published(state: RunState) -> bool:
    """Return whether a run began with published weights, or with weights that were made from them."""
    return state.initial_weights is not None and PUBLISHED in state.initial_weights


def _describe_model(config: Config) -> str:
    with torch.device("meta"):
        model = build_model(config.model.model_copy(update={"attention": "reference"}))
    whole, side, data = summarize(model)[-1], config.model.img_size, config.data
    resized = "both sides squashed to it" if data.eval_resize == "squash" else "the short side resized"
    overrides = config.model.overrides.model_dump(exclude_none=True) if config.model.overrides else {}
    changed = "".join(f", {key} {list(v) if isinstance(v, tuple) else v}" for key, v in overrides.items())
    rows = {
        "architecture": f"`{config.model.name}`{changed}",
        "parameters": f"{whole.num_params:,}",
        "multiply-adds": f"{whole.gmacs:.3f} GMAC an image",
        "input": f"{side} × {side} pixels, RGB; {resized}, bicubic; the centre {data.crop_pct:.4g} of it",
        "pixels": f"in [0, 1], less {list(data.mean)}, divided by {list(data.std)}",
        "classes": f"{config.model.num_classes}",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _describe_use(config: Config, name: str, classes: Sequence[str] | None) -> str:
    first = "import gcvit.model  # registers it with timm\n" if name == config.model.name else ""
    names = "\nThe names of the classes stand in `config.json`, in the order of the outputs.\n" if classes else ""
    return (
        f'```python\nimport timm\n{first}\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n```\n'
        f"\nFOLDER is this one. `timm.data.resolve_model_data_config(model)` tells how to prepare images.\n{names}"
    ).rstrip()


def _describe_results(config: Config, kind: str, state: RunState, records: Sequence[Record]) -> str:
    lines: list[str] = []
    if records:
        lines += ["| set | top-1 % | top-5 % | ECE | images | size, centre, resizing |", "|---|---|---|---|---|---|"]
        for record in records:
            found, options = record["result"], record.get("options", {})
            looks = [_text(options[key]) for key in ("img_size", "crop_pct", "resize", "tta") if options.get(key)]
            numbers = f"{found['top1']:.3f} | {found['top5']:.3f} | {found['ece']:.4f} | {found['num_samples']:,}"
            lines.append(f"| {record['name']} | {numbers} | {', '.join(looks)} |")
        lines += ["", "Each image was counted once."]
    if state.best_step == state.step and kind == ("ema" if config.ema else "model"):
        lines.append(f"In the run's own evaluation these weights were its best: top-1 {state.best_top1:.3f} % on val.")
    return "\n".join(lines) or "None are known: these weights have not been evaluated."


def _text(value: object) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)


def _describe_training(config: Config, kind: str, state: RunState) -> str:
    optim, schedule = config.optim, config.schedule
    rate = f"AdamW, learning rate up to {optim.lr:g}: cosine over {schedule.cosine}"
    if _is_any(schedule.warmup):
        rate += f", of which {schedule.warmup} warm up from {optim.warmup_lr:g}"
    if _is_any(schedule.cooldown):
        rate += f", then {schedule.cooldown} at {optim.min_lr:g}"
    clipping = "no clipping" if optim.clip_norm is None else f"gradients clipped at a norm of {optim.clip_norm:g}"
    averaged = config.ema and kind == "ema" and f"a moving average over training, half-life {config.ema.half_life}"
    sentences = [
        f"Initial weights: {state.initial_weights or 'drawn anew'}.",
        f"{state.samples:,} images in {state.step:,} updates of {config.global_batch_size:,}, in {config.precision}.",
        f"{rate}.",
        f"Weight decay {optim.weight_decay:g}, {clipping}.",
        *(["Early layers learn slower, by " + f"{optim.layer_decay:g} a layer."] if optim.layer_decay else []),
        *([f"At first the head alone moved, for {optim.frozen_backbone}."] if optim.frozen_backbone else []),
        f"Augmentation: {', '.join(_list_augmentation(config.augment))}.",
        f"The weights here are {averaged or 'those of the last update, not averaged'}.",
        "The whole config is in the metadata of the weights' file.",
    ]
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _is_any(duration: str) -> bool:
    return float(duration.split()[0]) > 0


def _list_augmentation(augment: AugmentConfig) -> Iterator[str]:
    yield f"crops of {augment.scale[0]:.0%} to {augment.scale[1]:.0%} of the image"
    if augment.hflip:
        yield f"horizontal flips {augment.hflip:g}"
    if augment.rand_augment:
        yield f"RandAugment `{augment.rand_augment}`"
    if augment.color_jitter:
        yield f"colour jitter {augment.color_jitter:g}"
    if augment.affine:
        yield "random affine maps"
    if augment.erase_prob:
        yield f"random erasing {augment.erase_prob:g}"
    if augment.mix:
        yield f"mixup {augment.mix.mixup:g}"
        yield f"cutmix {augment.mix.cutmix:g}"
    if augment.label_smoothing:
        yield f"label smoothing {augment.label_smoothing:g}"


def _describe_licence(state: RunState) -> str:
    if is_published(state):
        return (
            "These weights were made from the weights that the authors of GC ViT have published under CC-BY-NC-SA-4.0. "
            "That licence goes with them: **not for commercial use**, and what is made from them stays under it."
        )
    return (
        "None is stated yet. It is for the owner of these weights to choose one, having regard to the images they were "
        "trained on: add `license: ...` to the head of this file. gcvit itself is under Apache-2.0."
    )


_CITATION = """\
The architecture is its authors' work:

> Ali Hatamizadeh, Hongxu Yin, Greg Heinrich, Jan Kautz, Pavlo Molchanov: *Global Context Vision Transformers.*
> International Conference on Machine Learning (ICML), 2023."""
