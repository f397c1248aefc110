"""Measure what monitoring costs a training. `python -m benchmarks.live [--quick] [--check] [--json FILE]`

Monitored steps (timers of stages and loader, wrapped collectives, sums of losses and correct samples and, at the usual
logging interval, a row: the ranks' barrier, metrics.jsonl, TensorBoard and the line) against the same steps without.
Two processes, by ddp and by fsdp; data loaded in the processes themselves. The model is so small that steps are
shorter than any real ones: the cost of monitoring has more weight in them.

    steps      the median, over pairs of steps of which either comes first in turn, of their seconds' ratio, less 1
    row        the median of a row's seconds, and what share they are of the steps between two rows
    overhead   both shares together; bar: less than 1 %
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.command import conclude, make_parser
from benchmarks.engines_saves import measure_engines

ROOT = Path(__file__).parents[1]
BAR = 0.01
ENGINES = ("ddp", "fsdp")
LOG_EVERY = 50  # steps, as all recipes have it
NUM_PAIRS, WARM_UP = 600, 10
TINY = "{width: 16, depths: [2, 2, 2, 2], num_heads: [1, 2, 4, 8], windows: [4, 2, 2, 1]}"


@contextmanager
def unwatched() -> Iterator[None]:
    """Remove what the steps record, in the loader too."""
    from gcvit.data.stage_timer import StageTimer
    from gcvit.monitoring.step_timer import StepTimer
    from gcvit.training import trainer

    nothing = torch.zeros((), dtype=torch.int64)
    with ExitStack() as stack:
        for owner, name, instead in (
            (StageTimer, "switch", lambda timer, stage: None),
            (StepTimer, "switch", lambda timer, stage: None),
            (StepTimer, "during", lambda timer, stage: nullcontext()),
            (trainer, "count_correct", lambda logits, targets: nothing),
        ):
            stack.enter_context(mock.patch.object(owner, name, instead))
        yield


def measure_engine(name: str, num_pairs: int, folder: Path) -> dict[str, Any] | None:
    """Measure one engine; each of its processes calls this, and rank 0 gets the results."""
    from gcvit.config.load import load_config
    from gcvit.data.source import open_sources
    from gcvit.monitoring.step_timer import time_waits
    from gcvit.runtime.distributed import join_world
    from gcvit.training.setup import build_trainer

    torch.set_num_threads(1)
    words = [f"data.dir={folder / 'images'}", f"output_dir={folder}", f"tag={name}", f"engine={name}", "precision=fp32"]
    words += ["model.num_classes=4", "model.img_size=32", f"model.overrides={TINY}", "data.num_workers=0", "ema=null"]
    words += ["global_batch_size=16", "augment.mix.group_size=8", "schedule.warmup=0 steps"]
    words += ["schedule.cosine=100000 steps", "trainer.eval_every=100000 steps", "trainer.save_every=100000 steps"]
    config, _ = load_config(ROOT / "configs/gc_vit_xxtiny.yaml", words)
    rows: list[float] = []
    steps: dict[bool, list[float]] = {True: [], False: []}
    row_every = min(LOG_EVERY, num_pairs)
    with (
        join_world() as world,
        build_trainer(config, world, open_sources(config.data, config.model.num_classes)) as trainer,
    ):

        def time_step(is_watched: bool) -> float:
            watching = time_waits(trainer.timer, trainer.engine) if is_watched else unwatched()
            with watching:
                world.barrier()
                begin = time.perf_counter()
                step = trainer.train_step(next(trainer.timer.batches(trainer.stream) if is_watched else trainer.stream))
                if is_watched:
                    trainer.timer.switch(None)
                    trainer.metrics.add(step.loss_sum, step.num_correct, step.result)
                seconds = time.perf_counter() - begin
            trainer.state.step += 1
            if is_watched and len(steps[True]) % row_every == row_every - 1:
                begin = time.perf_counter()
                trainer.log_step(step)
                rows.append(time.perf_counter() - begin)
            return seconds

        for pair in range(num_pairs + WARM_UP):
            for is_watched in (True, False) if pair % 2 else (False, True):
                steps[is_watched].append(time_step(is_watched))
    if not world.is_rank0:
        return None
    ratios = [w / bare - 1 for w, bare in zip(steps[True][WARM_UP:], steps[False][WARM_UP:], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    step, row = statistics.median(steps[False][WARM_UP:]), statistics.median(rows)
    return {
        "pairs": num_pairs,
        "step_seconds": step,
        "steps": middle,
        "steps_quartiles": (low, high),
        "row_seconds": row,
        "rows": row / (LOG_EVERY * step),
        "overhead": middle + row / (LOG_EVERY * step),
        "all_ratios": ratios,
    }


def measure_live(quick: bool) -> dict[str, Any]:
    """Measure each engine, and return the results by engine."""
    return measure_engines("benchmarks.live", ENGINES, *(["--quick"] if quick else []))


def find_misses(results: dict[str, Any]) -> list[str]:
    return [
        f"{name}: overhead {result['overhead']:.2%}, bar {BAR:.0%}"
        for name, result in results.items()
        if result["overhead"] >= BAR
    ]


def print_live(results: dict[str, Any]) -> None:
    print(f"{'engine':8}{'pairs':>7}{'step':>10}{'steps':>9}{'half within':>19}{'row':>10}{'':9}{'overhead':>11}")
    for name, x in results.items():
        within = "{:+.1%} to {:+.1%}".format(*x["steps_quartiles"])
        print(
            f"{name:8}{x['pairs']:7}{1e3 * x['step_seconds']:7.1f} ms{x['steps']:+9.2%}{within:>19}"
            f"{1e3 * x['row_seconds']:7.1f} ms{x['rows']:+9.2%}{x['overhead']:+11.2%}"
        )


def main() -> None:
    parser = make_parser("live", __doc__, "few steps")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        result = measure_engine(arguments.worker, 4 if arguments.quick else NUM_PAIRS, arguments.json.parent)
        if result:
            arguments.json.write_text(json.dumps(result))
        return
    results = measure_live(arguments.quick)
    print_live(results)
    conclude(results, find_misses(results), arguments)


if __name__ == "__main__":
    main()
