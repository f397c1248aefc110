"""Define the golden runs, their images, engines and cases, and start `golden_worker.py` for a list of them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.launching import succeed, torchrun

CONFIG = Path(__file__).with_name("golden.yaml")
WORKER = Path(__file__).parents[1] / "integration/golden_worker.py"
CASES = {
    "a": [],
    "b": ["optim.weight_decay=50"],
    "c": ["optim.clip_norm=1e6"],  # with two micro-steps: see `overrides`
}
ENGINES = {
    "ddp": ["engine=ddp"],
    "fsdp": ["engine=fsdp", "fsdp.unit_parameters=10000"],
    "zero1": ["engine=zero", "zero.stage=1"],
    "zero2": ["engine=zero", "zero.stage=2"],
    "zero3": ["engine=zero", "zero.stage=3"],
}


def make_images(root: Path) -> None:
    """Write train/ and val/ of four classes of noisy colours, the same on every call."""
    rng = np.random.default_rng(0)
    for split, per_class in (("train", 25), ("val", 5)):
        for label in range(4):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 120, (36, 36, 3)) + np.array([40 * label, 120 - 40 * label, 60])
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")


def overrides(case: str, world_size: int) -> list[str]:
    halves = [f"trainer.micro_batch_size={-(-32 // world_size // 2) + 1}"] if case == "c" else []
    return CASES[case] + halves


def train_all(runs: list[dict], world_size: int, images: Path, out: Path, **extra: str) -> None:
    """Do the runs on that many processes; `extra` are additional environment variables."""
    spec = out / f"spec-{world_size}.json"
    spec.write_text(json.dumps({"config": str(CONFIG), "data": str(images), "out": str(out), "runs": runs}))
    succeed(torchrun(world_size, WORKER, spec, timeout=600, **extra))
