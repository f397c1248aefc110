"""Trainings into which what is not finite is put: `nonfinite_worker.py DATA OUT`, on 2 processes in one group.

Each is a real `Trainer.train`, of images that no augmentation changes. OUT/report.json holds for "KIND ENGINE
PRECISION" what the ranks saw of every step: digests of all fragments and the count of updates before and after, values
that went to the host; the pixels of the poisoned image, and the error that ended the run.
"""

import contextlib
import gc
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gcvit.config.load import load_config
from gcvit.data import loader
from gcvit.data.source import open_sources
from gcvit.errors import UserError
from gcvit.optim.loss import soft_target_loss
from gcvit.runtime.distributed import World, join_world
from gcvit.training import trainer as trainer_module
from gcvit.training.setup import build_trainer
from gcvit.training.trainer import Trainer

CONFIG = Path(__file__).parents[1] / "helpers/golden.yaml"
ENGINES = {
    "ddp": ["engine=ddp", "trainer.micro_batch_size=8"],
    "fsdp": ["engine=fsdp", "fsdp.unit_parameters=10000", "trainer.micro_batch_size=8"],
    "zero1": ["engine=zero", "zero.stage=1", "trainer.micro_batch_size=8"],
    "zero2": ["engine=zero", "zero.stage=2", "trainer.micro_batch_size=8"],
    "zero3": ["engine=zero", "zero.stage=3", "trainer.micro_batch_size=8"],
}
PLAIN = [
    *("augment.scale=[1, 1]", "augment.ratio=[1, 1]", "augment.hflip=0", "augment.erase_prob=0", "augment.mix=null"),
    *("schedule.cosine=6 steps", "trainer.log_every=3 steps", "trainer.max_nonfinite_steps=3", "optim.lr=1e-3"),
    *("trainer.eval_every=50 steps", "trainer.save_every=50 steps"),
]
BAD_RANK, BAD_ROW = 1, 2
# What is poisoned at which steps, which count from 0.
KINDS = {
    "apart": {2: "loss", 4: "gradient"},
    "row": {3: "loss", 4: "gradient", 5: "loss"},
}
# The row ends a run, which is the same in every precision.
RUNS = [(engine, precision, "apart") for engine in ENGINES for precision in ("fp32", "bf16")]
RUNS += [(engine, "fp32", "row") for engine in ENGINES]
RUNS.sort(key=lambda run: list(ENGINES).index(run[0]))


class HostReads(TorchDispatchMode):
    """Counts the values that are read by the host, by finished steps, but for what is done `apart`."""

    def __init__(self, trainer: Trainer):
        super().__init__()
        self._trainer, self.counts, self._is_apart = trainer, [0] * 7, False

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten._local_scalar_dense.default and not self._is_apart:
            self.counts[self._trainer.state.step] += 1
        return function(*arguments, **(options or {}))

    def apart(self, function: Callable) -> Callable:
        def call(*arguments):
            self._is_apart = True
            try:
                return function(*arguments)
            finally:
                self._is_apart = False

        return call


def digest(trainer: Trainer) -> str:
    found = hashlib.sha256()
    for kind, parts in sorted(trainer.engine.fragments().items()):
        for name, part in sorted(parts.items()):
            found.update(f"{kind}.{name}".encode() + part.data.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def poison(trainer: Trainer, plan: dict[int, str]) -> mock._patch:
    """In the first micro-step, of one row on one rank: a loss of NaN with a finite gradient, or the reverse."""
    seen = set()

    def poisoned(logits: Tensor, targets: Tensor) -> Tensor:
        step = trainer.state.step
        kind = plan.get(step) if step not in seen and trainer.world.rank == BAD_RANK else None
        seen.add(step)
        row = torch.arange(len(logits), device=logits.device) == BAD_ROW
        if kind == "gradient":
            logits.register_hook(lambda gradient: torch.where(row[:, None], float("inf"), gradient))
        losses = soft_target_loss(logits, targets)
        return torch.where(row, torch.nan, 0) + losses if kind == "loss" else losses

    return mock.patch.object(trainer_module, "soft_target_loss", poisoned)


def observe(trainer: Trainer, plan: dict[int, str]) -> dict[str, Any]:
    """Train, with eyes on every step."""
    seen: dict[str, Any] = {"digests": [], "updates": [], "images": {}, "error": None}
    step, train_step = trainer.engine.step, Trainer.train_step
    reads = HostReads(trainer)

    read_state = reads.apart(lambda: (digest(trainer), trainer.engine.counters().updates))

    def observed_step(lr: float, **options: bool):
        before, result, after = read_state(), step(lr, **options), read_state()
        for name, pair in zip(("digests", "updates"), zip(before, after, strict=True), strict=True):
            seen[name].append(pair)
        return result

    def observed_train_step(trainer: Trainer, batches):
        if trainer.state.step in plan and trainer.world.rank == BAD_RANK:
            seen["images"][trainer.state.step] = batches[0].images[BAD_ROW].permute(1, 2, 0).flatten().tolist()
        return train_step(trainer, batches)

    with (
        poison(trainer, plan),
        mock.patch.object(Trainer, "train_step", observed_train_step),
        mock.patch.object(trainer.engine, "step", observed_step),
        mock.patch.object(loader._TrainDataset, "__getitem__", reads.apart(loader._TrainDataset.__getitem__)),
        reads,
    ):
        try:
            trainer.train()
        except UserError as error:
            seen["error"] = str(error)
    return {**seen, "reads": reads.counts}


def run_all(data: str, out: Path, world: World) -> dict[str, Any]:
    report = {}
    for engine, precision, kind in RUNS:
        tag = f"{kind}-{engine}-{precision}"
        overrides = [*PLAIN, *ENGINES[engine], f"precision={precision}", f"tag={tag}", f"output_dir={out}"]
        config, _ = load_config(CONFIG, [*overrides, f"data.dir={data}"])
        sources = open_sources(config.data, config.model.num_classes)
        with build_trainer(config, world, sources, resume="none") as trainer:
            seen = observe(trainer, KINDS[kind])
        again = {}
        if seen["error"]:
            with build_trainer(config, world, open_sources(config.data, config.model.num_classes)) as trainer:
                state = trainer.state
                again = {"step": state.step, "samples": state.samples, "digest": digest(trainer)}
        report[f"{kind} {engine} {precision}"] = world.gather({**seen, "again": again})
        gc.collect()  # engines hold themselves in circles
    return report


if __name__ == "__main__":
    torch.set_num_threads(1)
    data, out = sys.argv[1], Path(sys.argv[2])
    with join_world() as world, contextlib.redirect_stdout(sys.stderr):
        report = run_all(data, out, world)
        if world.is_rank0:
            (out / "report.json").write_text(json.dumps(report))
