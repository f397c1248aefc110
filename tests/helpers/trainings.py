"""Start trainings that tests disturb, real processes of train.py that start quickly, and read their files."""

import json
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gcvit.checkpoint.store import latest as latest_checkpoint
from gcvit.checkpoint.store import open_checkpoint, read_tensors, step_of
from tests.helpers.launching import ROOT, environment

KINDS = ("model", "exp_avg", "exp_avg_sq", "ema")


class Trainings:
    """Start trainings from one process that has torch, and these modules, loaded."""

    def __init__(self, data: Path, log: Path, modules: Sequence[str] = ()):
        self.data, self.log = data, log
        command = [sys.executable, str(ROOT / "tests/integration/kills_worker.py"), *modules]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.worker = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes)

    def start(self, run_dir: Path, ranks: int, *overrides: str, **request: Any) -> list[int]:
        """Start a training, and return the ids of its processes once it has begun. `request`: see `kills_worker.py`."""
        words = ["--config", "tests/helpers/golden.yaml", "--data_dir", self.data, "--tag", run_dir.name]
        words += [f"output_dir={run_dir.parent}", *overrides]
        request |= {"ranks": ranks, "words": [str(word) for word in words], "log": str(self.log)}
        self.worker.stdin.write(json.dumps(request) + "\n")
        self.worker.stdin.flush()
        return json.loads(self.worker.stdout.readline())

    def has_ended(self) -> bool:
        return bool(select.select([self.worker.stdout], [], [], 0)[0])

    def exit_codes(self) -> list[int]:
        """Return the exit codes of the last training's processes, after all have ended."""
        return json.loads(self.worker.stdout.readline())

    def end_of_log(self) -> str:
        return self.log.read_text()[-4000:]

    def close(self) -> None:
        self.worker.stdin.close()
        self.worker.wait(60)


def write_noise(root: Path, *, size: int = 36, train: int = 8, val: int = 2) -> None:
    """Write train/ and val/ of four classes of noise, so many images each."""
    rng = np.random.default_rng(0)
    for split, per_class in (("train", train), ("val", val)):
        for label in range(4):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for i in range(per_class):
                Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def read_tensors_of(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    found = open_checkpoint(run_dir / "checkpoints" / f"step_{step:08d}")
    return {f"{kind}.{n}": t for kind in KINDS for n, t in read_tensors(found, kind).items()}


def read_rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def newest_step(run_dir: Path) -> int:
    newest = latest_checkpoint(run_dir / "checkpoints")
    return step_of(newest) if newest else 0
