"""Log a run's metrics: lines, a progress bar, `metrics.jsonl`, TensorBoard events and W&B.

Sums stay on the device between logging steps, where they are read once, after one reduction over ranks.
`gcvit.monitoring.schema` defines the rows.
"""

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from gcvit.config.schema import Config
from gcvit.data.batch import Corruption
from gcvit.monitoring.schema import KINDS
from gcvit.monitoring.step_timer import Seconds, find_bottleneck
from gcvit.monitoring.writers import Events
from gcvit.optim.clip_grad import StepResult
from gcvit.runtime.distributed import World
from gcvit.runtime.log import LOGGER

_NAN = math.nan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _RankMetrics:
    """One rank's part of a row."""

    seconds: Seconds
    num_correct: int
    memory_bytes: int


class MetricLogger:
    """Collects a run's metrics and writes them on rank 0. Every rank has one and makes the same calls.

    Args:
        config: The whole config, since TensorBoard and W&B record it.
        train_flops: Floating-point operations per image in training.
        peak_flops: Peak floating-point operations per second of one device.

    Raises:
        UserError: On all ranks alike, if W&B is requested and does not start.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        *,
        first_step: int,
        total_steps: int,
        train_flops: float | None = None,
        peak_flops: float | None = None,
    ):
        self._world = world
        self._batch_size = config.global_batch_size
        self._total_steps = total_steps
        self._load = (
            train_flops / peak_flops if train_flops and peak_flops else _NAN
        )  # seconds per image of one device at its peak
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
        self._correct = torch.zeros((), dtype=torch.int64, device=world.device)
        self._refused = torch.zeros((), device=world.device)
        # In fp16 a loss scale that grows too high is refused regularly.
        self._refused_word = "refused" if config.precision == "fp16" else "REFUSED"
        self._num_steps, self._since = 0, time.perf_counter()
        self._rows: Path | None = None
        self._has_ended = False  # before this start: then nothing more is logged
        self._events: Events | None = None
        self._bar: tqdm[Any] | None = None
        self._open = ExitStack()
        if world.is_rank0:
            self._rows = config.run_dir / "metrics.jsonl"
            last = _drop_rows_after(self._rows, first_step)
            self._has_ended = first_step == total_steps and last is not None and last.get("outcome") == "finished"
            # A bar on a terminal only: a file gets plain lines and no control characters.
            if sys.stderr.isatty():
                bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)
                self._bar = self._open.enter_context(bar)
                self._open.enter_context(logging_redirect_tqdm([LOGGER]))  # lines go above the bar
        world.on_rank0(lambda: self._begin_events(config, first_step))

    def add(self, loss_sum: Tensor, num_correct: Tensor, result: StepResult) -> None:
        """Add one step: this rank's sum of losses, its number of correct samples, the update's result. Never waits."""
        self._loss_sum += torch.where(result.applied > 0, loss_sum, 0.0)  # one NaN would make the mean NaN
        self._correct += torch.where(result.applied > 0, num_correct, 0)
        self._refused += 1 - result.applied
        self._num_steps += 1
        if self._bar is not None:
            self._bar.update()

    def log_step(self, step: int, lr: float, result: StepResult, seconds: Seconds, num_corrupt: int) -> None:
        """Log the mean over the steps since the last call that were not refused.

        Args:
            step: Finished steps.
            seconds: This rank's seconds by stage since the last call.
            num_corrupt: Corrupt samples since this start.
        """
        num_refused = int(self._refused.item())
        num_samples = (self._num_steps - num_refused) * self._batch_size
        loss = self._world.sum(self._loss_sum).item() / num_samples if num_samples else _NAN
        of_ranks = self._world.gather(
            _RankMetrics(seconds, int(self._correct.item()), _peak_memory(self._world.device))
        )
        bound = find_bottleneck([rank.seconds for rank in of_ranks])
        clock_seconds = time.perf_counter() - self._since
        speed = self._num_steps * self._batch_size / clock_seconds
        row = {
            "loss": loss,
            "train_top1": 100 * sum(rank.num_correct for rank in of_ranks) / num_samples if num_samples else _NAN,
            "lr": lr,
            "grad_norm": result.grad_norm.item(),
            "refused_steps": num_refused,
            "images_per_second": speed,
            "images_per_second_per_device": speed / self._world.size,
            "mfu": speed / self._world.size * self._load,
            "memory_bytes": max(rank.memory_bytes for rank in of_ranks),
            "seconds": clock_seconds,
            "seconds_left": (self._total_steps - step) * clock_seconds / self._num_steps,
            "num_corrupt": num_corrupt,
            "data_wait": bound.data_wait,
            "bound_by": bound.bound_by,
            "bound_share": bound.bound_share,
            "slowest_rank": bound.slowest_rank,
            "stages": {stage: spent / self._num_steps for stage, spent in bound.stages.items()},
        }
        self._write(step, "train", row)
        logger.info(self._describe(step, row))
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} img/s")
        for total in (self._loss_sum, self._correct, self._refused):
            total.zero_()
        self._num_steps, self._since = 0, time.perf_counter()

    def _describe(self, step: int, row: Mapping[str, Any]) -> str:
        parts = [
            f"step {step}/{self._total_steps}",
            f"loss {row['loss']:.4f}",
            f"lr {row['lr']:.3g}",
            f"norm {row['grad_norm']:.3g}",
            f"{row['images_per_second']:.0f} img/s",
            *([f"{row['images_per_second_per_device']:.0f} a device"] if self._world.size > 1 else []),
            f"train top-1 {row['train_top1']:.1f} %",
            *([f"MFU {row['mfu']:.1%}"] if not math.isnan(row["mfu"]) else []),
            f"{row['memory_bytes'] / 1e9:.1f} GB",
            f"data {row['data_wait']:.0%}",
            f"bound by {row['bound_by']} {row['bound_share']:.0%}"
            + (f" on rank {row['slowest_rank']}" if self._world.size > 1 else ""),
            f"{timedelta(seconds=round(row['seconds_left']))} left",
            *([f"{row['num_corrupt']} corrupt"] if row["num_corrupt"] else []),
        ]
        if num_refused := row["refused_steps"]:
            parts.append(f"{self._refused_word} {num_refused} steps: gradient not finite")
        return "  ".join(parts)

    def log_start(self, step: int, row: dict[str, Any]) -> None:
        """Log the hosts, devices and versions that the run uses from here on."""
        if not self._has_ended:
            self._append(step, "start", row)

    def log_end(self, step: int, outcome: str, samples: int, best_top1: float | None) -> None:
        """Log the end: "finished", then with the best accuracy in percent, or "preempted"."""
        if self._has_ended:
            return
        best = {} if best_top1 is None else {"best_top1": best_top1}
        self._append(step, "end", {"outcome": outcome, "samples": samples, **best})
        if self._events is not None and best:
            self._events.add_result(best, step)
        elif self._events is not None:
            self._events.mark_preempted()

    def log_evaluation(self, step: int, name: str, row: dict[str, float | int]) -> None:
        """Log an evaluation of the "weights" or of their "ema"."""
        self._write(step, f"val/{name}", row)
        logger.info(
            f"step {step}/{self._total_steps}  {name}: top-1 {row['top1']:.2f} %  loss {row['loss']:.4f}"
            + (f"  without {row['num_skipped']} CORRUPT samples" if row.get("num_skipped") else "")
        )

    def log_checkpoint(self, step: int, row: dict[str, float | int]) -> None:
        """Log a complete checkpoint: "stall_seconds" of the training, "write_seconds" in the background, "bytes"."""
        self._write(step, "checkpoint", row)
        logger.info(
            f"step {step}/{self._total_steps}  saved {row['bytes'] / 1e9:.3g} GB in {row['write_seconds']:.1f} s"
            f"  training stopped for {row['stall_seconds']:.2f} s"
        )

    def log_refused_step(self, step: int, rank: int | None, what: str, samples: Sequence[str], num_samples: int) -> str:
        """Log why a step was refused.

        Args:
            what: "loss" or "gradient" of the samples of a rank.
            samples: Names of the first of `num_samples`; empty if no single sample caused it.

        Returns:
            The line.
        """
        row = {"rank": rank, "what": what, "samples": list(samples), "num_samples": num_samples}
        self._append(step, "bad_step", row)
        if samples:
            more = f" and {num_samples - len(samples)} more" if num_samples > len(samples) else ""
            text = f"{what} of {num_samples} samples on rank {rank}: {', '.join(samples)}{more}"
        else:
            text = "gradient of no single sample: of the stem's weights, or of a sum over the batch"
        logger.warning(f"step {step}/{self._total_steps}  REFUSED, not finite: {text}")
        return f"step {step}, {text}"

    def log_corruption(self, step: int, new: Sequence[Corruption], num_corrupt: int) -> None:
        """Log corrupt samples, which others replaced; `num_corrupt` counts all since this start."""
        for corruption in new:
            self._append(step, "corruption", {**asdict(corruption), "num_corrupt": num_corrupt})
            logger.warning(
                f"step {step}/{self._total_steps}  CORRUPT, replaced: {corruption.where} ({corruption.reason})"
            )

    def log_norms(self, step: int, name: str, of_stages: Mapping[str, npt.NDArray[np.float64]]) -> None:
        """Log norms of single tensors as a TensorBoard histogram for each stage of the model."""
        if self._events is not None:
            for stage, norms in of_stages.items():
                self._events.add_histogram(f"{name}/{stage}", norms, step)

    def log_image(self, step: int, name: str, image: npt.NDArray[np.uint8], caption: str) -> None:
        """Log an image, uint8 [H, W, 3], to TensorBoard."""
        if self._events is not None:
            self._events.add_image(name, image, caption, step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside (an evaluation, a save) from the training time."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

    def close(self, *, finished: bool = True) -> None:
        """Close the bar and the writers; `finished` is False if an error or a preemption ended the run."""
        if self._events is not None:
            self._events.close(finished=finished)
        self._open.close()

    def _begin_events(self, config: Config, first_step: int) -> None:
        if not self._has_ended:
            self._events = Events(config, first_step)

    def _write(self, step: int, kind: str, row: Mapping[str, Any]) -> None:
        """Write a row. Non-finite values (if all steps were refused) are null in JSON and absent in TensorBoard."""
        bad = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        self._append(step, kind, row)
        if self._events is not None:
            stages = {f"stages/{stage}": seconds for stage, seconds in row.get("stages", {}).items()}
            numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
            good = {name: value for name, value in numbers.items() if name not in bad}
            self._events.add_scalars(kind, good | stages, step)

    def _append(self, step: int, kind: str, row: Mapping[str, Any]) -> None:
        if self._rows is not None:
            row = {"step": step, "kind": kind, "time": time.time(), **KINDS[kind](**row).as_dict()}
            with open(self._rows, "a") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")


def _peak_memory(device: torch.device) -> int:
    """Return the peak bytes of this process, of GPU memory if it has a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _drop_rows_after(path: Path, step: int) -> dict[str, Any] | None:
    """Drop the rows after a step, which a resumed run repeats, and a last line that was cut off.

    Returns:
        The last row that is left.
    """
    if not path.exists():
        return None
    rows = [row for row in map(_parse_row, path.read_text().splitlines()) if row and row["step"] <= step]
    kept = path.with_suffix(".tmp")
    kept.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    kept.replace(path)
    return rows[-1] if rows else None


def _parse_row(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:  # a write that was cut off
        return None
