"""Write runs' folders as train.py and evaluate.py leave them, without training: the numbers come from a formula."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gcvit.data.source import open_source

CLASSES = ("apple", "brick", "cloud", "drum")
BEGIN = 1_790_000_000.0
STAGES = ("storage", "decoding", "augmentation", "collation", "copy", "compute", "communication", "checkpoint")


def write_images(root: Path, classes: tuple[str, ...] = CLASSES, num: int = 4) -> None:
    """Write train/ and val/ of class folders: a colour for each class."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(num):
                pixels = rng.integers(0, 60, (48, 64, 3)) + np.array([50 * label, 120, 190 - 40 * label])
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")


def write_run(
    folder: Path, num_rows: int = 60, *, batch_size: int = 64, lr: float = 1e-3, seed: int = 0, name: str | None = None
) -> Path:
    """Write a run that was preempted in its middle, started again on fewer devices, and finished."""
    folder.mkdir(parents=True)
    config = {
        "tag": name or folder.name,
        "global_batch_size": batch_size,
        "engine": "fsdp",
        "model": {"name": "gc_vit_xxtiny", "num_classes": len(CLASSES), "img_size": 64},
        "optim": {"lr": lr, "betas": [0.9, 0.999]},
    }
    (folder / "config.yaml").write_text(json.dumps(config, indent=1))  # JSON is YAML
    write_rows(folder, make_rows(num_rows, batch_size, lr, seed))
    return folder


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def make_rows(num_rows: int, batch_size: int, lr: float, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    noise, total = rng.normal(size=(num_rows, 4)), num_rows * 10
    time, rows = BEGIN, [make_start(0, BEGIN, batch_size, world_size=8)]
    for i in range(num_rows):
        part, step = (i + 1) / num_rows, (i + 1) * 10
        if i == num_rows // 2:
            rows.append({"step": step - 10, "kind": "end", "time": time, "outcome": "preempted", "samples": step})
            time += 0.15 * 12 * num_rows
            rows.append(make_start(step - 10, time, batch_size, world_size=4))
        time += 12.0
        is_refused = i in (num_rows // 3, num_rows // 3 + 1)
        loss = 0.6 + 2.2 * math.exp(-4 * part) + 0.03 * noise[i, 0]
        speed = (5200 if i < num_rows // 2 else 2600) * (1 + 0.03 * noise[i, 1])
        compute = batch_size * 8 / speed
        stages = {
            **dict.fromkeys(STAGES, 0.002 * compute),
            "storage": 0.06 * compute * (1 + 0.3 * noise[i, 2] ** 2),
            "decoding": 0.2 * compute,
            "augmentation": 0.12 * compute,
            "compute": compute,
            "communication": 0.11 * compute,
        }
        rows.append(
            {
                "step": step,
                "kind": "train",
                "time": time,
                "loss": None if is_refused else loss,
                "train_top1": 100 * (1 - loss / 3.2),
                "lr": lr * 0.5 * (1 + math.cos(math.pi * part)),
                "grad_norm": 1.2 * math.exp(0.4 * noise[i, 3]) * (40 if i == num_rows // 3 - 1 else 1),
                "refused_steps": 2 if is_refused else 0,
                "images_per_second": speed,
                "images_per_second_per_device": speed / (8 if i < num_rows // 2 else 4),
                "mfu": 0.31 + 0.01 * noise[i, 1],
                "memory_bytes": int(21e9),
                "seconds": 11.5,
                "seconds_left": 12.0 * (num_rows - i),
                "num_corrupt": 0,
                "data_wait": 0.04 + 0.01 * abs(noise[i, 2]),
                "bound_by": "decoding" if i % 7 == 0 else "compute",
                "bound_share": 0.6,
                "slowest_rank": i % 3,
                "stages": stages,
            }
        )
        if is_refused:
            named = {"what": "loss", "rank": 3, "samples": ["train-000012.tar/n0153.jpg"], "num_samples": 1}
            rows.append({"step": step, "kind": "bad_step", "time": time, **named})
        if (i + 1) % max(1, num_rows // 6) == 0:
            for kind, gain in (("val/weights", 0.0), ("val/ema", 2.0)):
                top1 = min(99.0, 38 + 46 * part**0.5 + gain)
                row = {"top1": top1, "top5": top1 + 9, "loss": 2.4 - top1 / 50, "num_samples": 5000}
                rows.append({"step": step, "kind": kind, "time": time, **row, "num_skipped": 0, "seconds": 20.0})
            saved = {"bytes": 480e6, "stall_seconds": 0.4, "write_seconds": 3.1}
            rows.append({"step": step, "kind": "checkpoint", "time": time, **saved})
    corruption = {"sample": 77, "where": "train-000003.tar/a.jpg", "reason": "another checksum", "num_corrupt": 1}
    rows.append({"step": total, "kind": "corruption", "time": time, **corruption})
    rows.append({"step": total, "kind": "end", "time": time, "outcome": "finished", "samples": total * batch_size})
    return rows


def make_start(step: int, time: float, batch_size: int, world_size: int) -> dict[str, Any]:
    return {
        "step": step,
        "kind": "start",
        "time": time,
        "world_size": world_size,
        "hosts": ["node-a", "node-b"][: max(1, world_size // 4)],
        "device": "NVIDIA H100 80GB HBM3",
        "num_devices": world_size,
        "engine": "fsdp",
        "precision": "bf16",
        "global_batch_size": batch_size,
        "micro_batch_size": batch_size // world_size,
        "accumulation": 1,
        "versions": {"gcvit": "0.1.0", "python": "3.11.2", "torch": "2.15.0", "timm": "1.0.31"},
        "commit": "236216c",
        "parameters": 11_995_428,
        "train_flops_per_image": 12.7e9,
        "peak_flops": 989.5e12,
        "samples": step * batch_size,
    }


def write_evaluation(folder: Path, data: Path, name: str = "val", num_right: tuple[int, ...] = (9, 7, 12, 3)) -> Path:
    """Write an evaluation of 12 images a class, `num_right` of which are right; mistakes are images of `data`."""
    source = open_source(data, "val")
    bins = [{"low": i / 15, "high": (i + 1) / 15, "num": 0, "confidence": None, "accuracy": None} for i in range(15)]
    for i, (num, accuracy) in {6: (5, 0.3), 9: (9, 0.55), 12: (14, 0.7), 14: (20, 0.95)}.items():
        bins[i] |= {"num": num, "confidence": (i + 0.6) / 15, "accuracy": accuracy}
    per_class = [
        {"class": label, "num": 12, "correct_top1": right, "correct_top5": 12}
        for label, right in zip(source.classes, num_right, strict=True)
    ]
    mistakes = [
        {
            "key": source.name(4 * label + i),
            "index": 4 * label + i,
            "label": source.classes[label],
            "predicted": source.classes[(label + 1 + i) % 4],
            "confidence": 0.9 - 0.1 * i,
        }
        for label, right in enumerate(num_right)
        for i in range(min(3, 12 - right))
    ]
    correct, total = sum(num_right), 12 * len(num_right)
    evaluation = {
        "name": name,
        "weights": "ema",
        "checkpoint": {"path": "runs/x/checkpoints/step_00000600", "step": 600, "sha256": "ab" * 32},
        "data": {"dir": str(data), "split": "val", "sha256": source.digest, "num_samples": total},
        "options": {
            "label_set": None if name == "val" else name,
            "batch_size": 64,
            "hflip": True,
            "img_size": [64],
            "crop_pct": 1.0,
        },
        "versions": {"gcvit": "0.1.0", "torch": "2.15.0"},
        "time": BEGIN + 1e4,
        "seconds": 3.5,
        "images_per_second": 1710.0,
        "world_size": 1,
        "device": "NVIDIA H100 80GB HBM3",
        "result": {
            "top1": 100 * correct / total,
            "top5": 100.0,
            "loss": 0.81,
            "num_samples": total,
            "correct_top1": correct,
            "correct_top5": total,
            "num_skipped": 1,
            "ece": 0.0713,
            "reliability": bins,
            "per_class": per_class,
            "confused": [
                {"label": "drum", "predicted": "apple", "num": 6},
                {"label": "brick", "predicted": "drum", "num": 3},
            ],
            "mistakes": mistakes,
        },
    }
    path = folder / "evaluations" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(evaluation))
    return path


def write_samples(folder: Path, step: int, num: int = 8, num_columns: int = 4, side: int = 48) -> None:
    """Write a grid of tiles of one colour each, and their descriptions."""
    rng = np.random.default_rng(step)
    num_rows = -(-num // num_columns)
    pixels = np.zeros((num_rows * side, num_columns * side, 3), np.uint8)
    for i in range(num):
        row, column = divmod(i, num_columns)
        pixels[row * side : (row + 1) * side, column * side : (column + 1) * side] = rng.integers(40, 220, 3)
    tiles = [
        {
            "key": f"train/{i}.png",
            "label": CLASSES[i % 4],
            "targets": [[CLASSES[i % 4], 0.7], [CLASSES[(i + 1) % 4], 0.2], [CLASSES[(i + 2) % 4], 0.05]],
        }
        for i in range(num)
    ]
    (folder / "samples").mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / "samples" / f"step_{step}.png")
    (folder / "samples" / f"step_{step}.json").write_text(json.dumps(tiles))
