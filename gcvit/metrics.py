"""What the user sees of a run: a progress bar or lines, `metrics.jsonl` and TensorBoard events.

Sums stay on the device between logging steps; only there are they read, once, after one reduction over ranks.
"""

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from gcvit.config import Config
from gcvit.config_file import dump_config
from gcvit.data.batch import Damage
from gcvit.parallel.engine import StepResult
from gcvit.parallel.world import World


class Metrics:
    """Collects a run's numbers. All ranks take part; rank 0 writes."""

    def __init__(self, config: Config, world: World, *, first_step: int, total_steps: int):
        self._world = world
        self._batch_size = config.global_batch_size
        self._total_steps = total_steps
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
        self._refused = torch.zeros((), device=world.device)
        # In fp16 a loss scale that grows too high is refused every so often: nothing to shout about.
        self._refused_word = "refused" if config.precision == "fp16" else "REFUSED"
        self._num_steps, self._since = 0, time.perf_counter()
        self._rows: Path | None = None
        self._events: SummaryWriter | None = None
        self._bar: tqdm[Any] | None = None
        if world.is_first:
            self._rows = config.run_dir / "metrics.jsonl"
            _drop_rows_after(self._rows, first_step)
            self._events = SummaryWriter(str(config.run_dir), purge_step=first_step + 1)
            self._events.add_text("config", f"```yaml\n{dump_config(config)}\n```", first_step)
            # A bar only where someone looks at it: a log file gets plain lines and no control characters.
            if sys.stderr.isatty():
                self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def add(self, loss_sum: Tensor, result: StepResult) -> None:
        """Take in one step: the sum of this rank's losses and what the update did. Waits for nothing."""
        self._loss_sum += torch.where(result.applied > 0, loss_sum, 0.0)  # one NaN would hide all others
        self._refused += 1 - result.applied
        self._num_steps += 1
        if self._bar is not None:
            self._bar.update()

    def log_step(self, step: int, lr: float, result: StepResult) -> None:
        """Log the mean over the steps since the last call that were not refused; `step` counts finished steps."""
        num_refused = int(self._refused.item())
        num_samples = (self._num_steps - num_refused) * self._batch_size
        loss = self._world.sum(self._loss_sum).item() / num_samples if num_samples else math.nan
        seconds = time.perf_counter() - self._since
        row = {
            "loss": loss,
            "lr": lr,
            "grad_norm": result.grad_norm.item(),
            "refused_steps": num_refused,
            "images_per_second": self._num_steps * self._batch_size / seconds,
        }
        self._write(step, "train", row)
        self._say(
            f"step {step}/{self._total_steps}  loss {loss:.4f}  lr {lr:.3g}  norm {row['grad_norm']:.3g}"
            f"  {row['images_per_second']:.0f} img/s"
            + (f"  {self._refused_word} {num_refused} steps: gradient not finite" if num_refused else "")
        )
        self._loss_sum.zero_()
        self._refused.zero_()
        self._num_steps, self._since = 0, time.perf_counter()

    def log_evaluation(self, step: int, name: str, row: dict[str, float | int]) -> None:
        """Log an evaluation of the "weights" or of their "ema"."""
        self._write(step, f"val/{name}", row)
        self._say(
            f"step {step}/{self._total_steps}  {name}: top-1 {row['top1']:.2f} %  loss {row['loss']:.4f}"
            + (f"  without {row['num_skipped']} DAMAGED samples" if row.get("num_skipped") else "")
        )

    def log_checkpoint(self, step: int, row: dict[str, float | int]) -> None:
        """Log a checkpoint that is complete: "stall_seconds" of the training, "write_seconds" beside it, "bytes"."""
        self._write(step, "checkpoint", row)
        self._say(
            f"step {step}/{self._total_steps}  saved {row['bytes'] / 1e9:.3g} GB in {row['write_seconds']:.1f} s"
            f"  training stopped for {row['stall_seconds']:.2f} s"
        )

    def log_bad_step(self, step: int, rank: int | None, what: str, samples: Sequence[str], num_samples: int) -> str:
        """Log why a step was refused, and return the line: the "loss" or the "gradient" of samples of a rank.

        `samples` names the first of `num_samples`; where there is none, no sample's own share was at fault.
        """
        row = {"rank": rank, "what": what, "samples": list(samples), "num_samples": num_samples}
        self._append({"step": step, "kind": "bad_step", **row})
        if samples:
            more = f" and {num_samples - len(samples)} more" if num_samples > len(samples) else ""
            text = f"{what} of {num_samples} samples on rank {rank}: {', '.join(samples)}{more}"
        else:
            text = "gradient of no sample in particular: of the stem's weights, or of a sum over the batch"
        self._say(f"step {step}/{self._total_steps}  REFUSED, not finite: {text}")
        return f"step {step}, {text}"

    def log_damage(self, step: int, new: Sequence[Damage], num_damaged: int) -> None:
        """Log samples that were found damaged and replaced by others; `num_damaged` counts all so far."""
        for damage in new:
            self._append({"step": step, "kind": "damage", **asdict(damage), "num_damaged": num_damaged})
            self._say(f"step {step}/{self._total_steps}  DAMAGED, replaced: {damage.where} ({damage.reason})")

    def say(self, text: str) -> None:
        """A line for the user, from rank 0."""
        self._say(text)

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """What is done inside (an evaluation, a save) does not count as training time."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
        if self._bar is not None:
            self._bar.close()

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._world.is_first:
            print(text, file=sys.stderr, flush=True)

    def _write(self, step: int, kind: str, row: dict[str, float | int]) -> None:
        """JSON has no word for what is not finite (of steps that were all refused): it gets null, TensorBoard none."""
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        self._append({"step": step, "kind": kind, **dict.fromkeys(row), **finite})
        if self._events is not None:
            for name, value in finite.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def _append(self, row: dict[str, Any]) -> None:
        if self._rows is not None:
            with open(self._rows, "a") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")


def _drop_rows_after(path: Path, step: int) -> None:
    """A resumed run does its steps again: rows of the first try go, and a last line that was cut off."""
    if path.exists():
        rows = [line for line in path.read_text().splitlines() if line.endswith("}")]
        kept = path.with_suffix(".tmp")
        kept.write_text("".join(f"{row}\n" for row in rows if json.loads(row)["step"] <= step))
        kept.replace(path)
