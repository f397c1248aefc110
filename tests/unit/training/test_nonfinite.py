"""What is watched of a step and what is said of it, in a world of one. Engines and ranks: tests/integration."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gcvit.checkpoint import store
from gcvit.config.load import load_config
from gcvit.data.batch import Corruption
from gcvit.data.source import open_sources
from gcvit.errors import UserError
from gcvit.optim.clip_grad import StepResult
from gcvit.optim.loss import soft_target_loss
from gcvit.runtime.distributed import World, join_world
from gcvit.training import nonfinite
from gcvit.training import trainer as trainer_module
from gcvit.training.nonfinite import poison_nonfinite
from gcvit.training.setup import build_trainer
from gcvit.training.trainer import Trainer
from tests.helpers.launching import ROOT


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    torch.set_num_threads(1)
    with join_world() as joined:
        yield joined


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(4):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(4):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return root


def begin(images: Path, out: Path, world: World, *overrides: str):
    small = ["model.overrides.width=8", "trainer.eval_batch_size=4", f"data.dir={images}", f"output_dir={out}"]
    common = ["global_batch_size=4", "schedule.cosine=8 steps", "trainer.eval_every=90 steps", "ema=null", *small]
    config, _ = load_config(ROOT / "tests/helpers/golden.yaml", [*common, "trainer.save_every=90 steps", *overrides])
    return build_trainer(config, world, open_sources(config.data, config.model.num_classes))


def rows(trainer: Trainer, kind: str) -> list[dict]:
    lines = (trainer.config.run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def break_losses(monkeypatch, trainer: Trainer, steps: set[int], num_rows: int) -> None:
    """The first rows' losses become infinite, with finite gradients, at steps that count from 1."""

    def broken(logits: Tensor, targets: Tensor) -> Tensor:
        losses = soft_target_loss(logits, targets)
        extra = torch.where(torch.arange(len(losses)) < num_rows, math.inf, 0.0)
        return losses + extra if trainer.state.step + 1 in steps else losses

    monkeypatch.setattr(trainer_module, "soft_target_loss", broken)


def refuse(monkeypatch, trainer: Trainer, steps: set[int]) -> None:
    """The engine refuses steps in which every sample is well."""
    step = trainer.engine.step

    def refusing(lr: float, *, head_only: bool) -> StepResult:
        result = step(lr, head_only=head_only)
        return dataclasses.replace(result, applied=result.applied * float(trainer.state.step + 1 not in steps))

    monkeypatch.setattr(trainer.engine, "step", refusing)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_has_such_a_gradient_and_others_keep_every_bit(bad):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, generator=generator, requires_grad=True)
    losses = x.exp()
    (expected,) = torch.autograd.grad(losses.sum(), x)
    poisoned = poison_nonfinite(x.exp() + torch.where(torch.arange(64) == 5, bad, 0.0))
    (gradient,) = torch.autograd.grad(poisoned.sum(), x)
    good = torch.arange(64) != 5
    assert torch.equal(gradient[good], expected[good])
    assert torch.equal(poisoned.detach()[good], losses.detach()[good])
    assert not torch.isfinite(gradient[5])


def test_the_first_samples_are_named_and_all_are_counted(images, world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nonfinite, "_NUM_NAMED", 2)
    with begin(images, tmp_path, world, "trainer.log_every=4 steps", "data.max_corrupt_fraction=1") as trainer:
        break_losses(monkeypatch, trainer, {3, 6}, num_rows=3)
        trainer.corruption.found.update((sample, Corruption(sample, "", "")) for sample in range(8))
        trainer.train()
    found = rows(trainer, "bad_step")
    assert [(row["step"], row["rank"], row["what"], row["num_samples"]) for row in found] == [
        (3, 0, "loss", 3),
        (6, 0, "loss", 3),
    ]
    for row in found:
        assert len(set(row["samples"])) == 2
        for name in row["samples"]:
            path, is_replaced, _ = name.partition(" (corrupt: another stood in for it)")
            assert (images / "train" / path).is_file()
            assert bool(is_replaced) == path.startswith(("class_0", "class_1"))
    said = capsys.readouterr().err
    assert said.count("REFUSED, not finite: loss of 3 samples on rank 0: class_") == 2
    assert said.count(" and 1 more\n") == 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_where_every_sample_is_well_that_is_said(images, world, tmp_path, monkeypatch, precision):
    """In fp16 it is the loss scale's work, and nothing is said of single steps."""
    with begin(images, tmp_path, world, "trainer.log_every=4 steps") as trainer:
        refuse(monkeypatch, trainer, {2, 3})
        config = trainer.config.model_copy(update={"precision": precision})
        dataclasses.replace(trainer, config=config).train()
    found = [{name: value for name, value in row.items() if name != "time"} for row in rows(trainer, "bad_step")]
    assert [row["refused_steps"] for row in rows(trainer, "train")] == [2, 0]
    nobody = {"kind": "bad_step", "rank": None, "what": "gradient", "samples": [], "num_samples": 0}
    assert found == ([{"step": step, **nobody} for step in (2, 3)] if precision == "fp32" else [])


@pytest.mark.parametrize(
    ("bad", "log_every", "save_every", "first", "saved"),
    [
        ({2, 3, 4}, 2, 90, 2, [1]),  # a row that is seen in parts
        ({1, 2, 3}, 1, 90, 1, [0]),  # from the beginning
        ({3, 4, 5}, 1, 2, 3, [2, 4]),  # one checkpoint is kept: from before, though one within the row was saved
        ({2, 3, 4}, 8, 2, 2, [1, 2]),  # seen in time, though nothing is logged
        ({1, 2, 4, 5, 7, 8}, 1, 90, None, [8]),  # never three in a row
        ({2, 3, 4}, 8, 90, None, [8]),  # a row that is over when it is seen
    ],
)
def test_a_row_of_bad_steps_ends_the_run(
    images, world, tmp_path, monkeypatch, bad, log_every, save_every, first, saved
):
    options = [f"trainer.log_every={log_every} steps", f"trainer.save_every={save_every} steps"]
    with begin(
        images, tmp_path, world, *options, "trainer.max_nonfinite_steps=3", "trainer.keep_checkpoints=1"
    ) as trainer:
        break_losses(monkeypatch, trainer, bad, num_rows=1)
        if first is None:
            trainer.train()
        else:
            with pytest.raises(UserError, match=f"--replay {first} ") as stopped:
                trainer.train()
            assert f"step_{first - 1:08d} is from before it" in str(stopped.value)
            assert ("--resume auto" in str(stopped.value)) == (max(saved) < first)
        trainer.checkpoints.wait()
    assert [row["step"] for row in rows(trainer, "bad_step")] == sorted(bad)
    there = store.list_checkpoints(trainer.config.run_dir / "checkpoints")
    assert [store.step_of(path) for path in there] == saved
    assert [store.open_checkpoint(path).state.samples for path in there] == [4 * step for step in saved]


def test_a_hopeless_run_is_not_evaluated(images, world, tmp_path, monkeypatch):
    """Else its best would be one whose checkpoint is never written, and the real best would be pruned."""
    evaluated = []
    monkeypatch.setattr(Trainer, "evaluate", lambda self, on_batch: evaluated.append(self.state.step) or True)
    options = ["trainer.log_every=8 steps", "trainer.eval_every=2 steps", "trainer.save_every=90 steps"]
    with begin(images, tmp_path, world, *options, "trainer.max_nonfinite_steps=3") as trainer:
        break_losses(monkeypatch, trainer, {4, 5, 6}, num_rows=1)
        with pytest.raises(UserError, match="--replay 4 "):
            trainer.train()
        trainer.checkpoints.wait()
    assert evaluated == [2, 4]


def test_a_row_of_the_log_ends_where_a_resume_begins(images, world, tmp_path):
    with begin(images, tmp_path, world, "trainer.log_every=4 steps", "trainer.save_every=3 steps") as trainer:
        trainer.train()
    assert [row["step"] for row in rows(trainer, "train")] == [3, 4, 6, 8]
