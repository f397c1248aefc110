"""A run, as `setup.py` builds it for the loop of `trainer.py`: its parts, and how it is logged, evaluated, saved."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from gcvit.checkpoint import resolve, store
from gcvit.checkpoint.manager import Saver
from gcvit.checkpoint.store import RunState
from gcvit.config.schema import Config
from gcvit.data.corruption_budget import CorruptionBudget
from gcvit.data.loader import Batch
from gcvit.data.source import Source
from gcvit.data.transforms import DeviceAugment
from gcvit.evaluation.evaluator import Result, evaluate
from gcvit.monitoring.metric_logger import Metrics
from gcvit.monitoring.norms import Norms
from gcvit.monitoring.profiler import Profiler
from gcvit.monitoring.sample_grid import Samples
from gcvit.monitoring.step_timer import StepClock
from gcvit.optim.adamw import StepResult
from gcvit.optim.lr_schedule import Schedule
from gcvit.parallel.engine import Engine, Fragments
from gcvit.runtime.distributed import World
from gcvit.training.ema import Ema


@dataclass(frozen=True)
class Intervals:
    """Steps between what is done every so often."""

    log: int
    evaluate: int
    save: int


@dataclass(frozen=True)
class Run:
    """What a training works with. Its only parts that change are the engine, the EMA and the state."""

    config: Config
    world: World
    train: Source
    val: Source
    schedule: Schedule
    every: Intervals
    stream: Iterator[tuple[Batch, ...]]
    augment: DeviceAugment
    engine: Engine
    ema: Ema | None
    state: RunState
    saver: Saver
    metrics: Metrics
    corruption: CorruptionBudget
    clock: StepClock
    samples: Samples
    norms: Norms
    profiler: Profiler


def log_step(run: Run, lr: float, result: StepResult) -> None:
    """A row of metrics, the samples that any rank had to replace, and now and then sample images and norms.

    Errors: UserError, on all ranks alike, where more samples are corrupt than the run may have.
    """
    step, seconds = run.state.step, run.clock.take(run.world.barrier)
    corrupt = run.corruption.settle(run.world)
    run.metrics.log_step(step, lr, result, seconds, len(run.corruption.found))
    run.metrics.log_corruption(step, corrupt, len(run.corruption.found))
    run.samples.write(run.metrics)
    run.norms.log(run.metrics)
    run.corruption.check()


def evaluate_all(run: Run, on_batch: Callable[[], None]) -> bool:
    """Evaluate the weights and their EMA on val; true where the best so far (the EMA's, if there is one) is beaten.

    `on_batch` is called on all ranks alike, equally often; what it raises leaves the run as it was.
    """
    run.engine.module.eval()
    results: dict[str, Result] = {}
    seconds: dict[str, float] = {}
    for name, place in (
        ("weights", nullcontext()),
        *((("ema", run.ema.swapped_in(run.engine)),) if run.ema else ()),
    ):
        begin = time.perf_counter()
        with place:
            results[name] = evaluate(
                run.engine,
                run.val,
                run.config.data,
                run.world,
                img_size=run.config.model.img_size,
                batch_size=run.config.trainer.eval_batch_size,
                skip_corrupt=True,  # said and counted; an error here would throw away what was just trained
                on_batch=on_batch,
            )
        seconds[name] = time.perf_counter() - begin
    for name, result in results.items():
        run.metrics.log_evaluation(run.state.step, name, result.as_dict() | {"seconds": seconds[name]})
    run.state.evaluation_due = False
    top1 = results["ema" if run.ema else "weights"].top1
    if top1 <= run.state.best_top1:
        return False
    run.state.best_top1, run.state.best_step = top1, run.state.step
    return True


def evaluate_late(run: Run, on_batch: Callable[[], None]) -> None:
    """Do the evaluation that a preemption put off, and note it in the checkpoint that the run went on from."""
    is_best = evaluate_all(run, on_batch)
    path = resolve.checkpoints_of(run.config.run_dir) / f"step_{run.state.step:08d}"
    if run.world.on_rank0(path.exists):
        run.world.on_rank0(lambda: store.restate(path, run.state))
    elif is_best:  # that one lies in another run's folder
        save(run)


def save(run: Run, *, prunes: bool = True) -> None:
    """Begin to write a checkpoint, by all ranks together. `prunes` and errors: as `Saver.save`."""
    run.state.counters = run.engine.counters()
    run.state.ema_updates = run.ema.updates if run.ema else 0
    info = {
        "config": run.config.model_dump(mode="json"),
        "data": run.train.digest,
        "world_size": run.world.size,
        "classes": list(run.train.classes),
    }
    run.saver.save(run.state, all_fragments(run.engine, run.ema), info, prunes=prunes)


def all_fragments(engine: Engine, ema: Ema | None) -> dict[str, Fragments]:
    return engine.fragments() | ({"ema": ema.fragments} if ema else {})
