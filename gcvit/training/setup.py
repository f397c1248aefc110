"""Build a trainer: its parts, and its state from a checkpoint, given weights or the seed."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np

from gcvit.checkpoint import resolve
from gcvit.checkpoint.manager import CheckpointManager
from gcvit.checkpoint.store import Checkpoint, RunState
from gcvit.checkpoint.weights_source import describe_origin
from gcvit.config.schema import Config, EmaConfig, OptimConfig
from gcvit.data.batch_plan import BatchPlan, check_world
from gcvit.data.corruption_budget import CorruptionBudget
from gcvit.data.loader import train_stream
from gcvit.data.source import Source, num_local_ranks
from gcvit.data.transforms import DeviceAugment
from gcvit.errors import UserError
from gcvit.monitoring.environment import describe_environment
from gcvit.monitoring.metric_logger import MetricLogger
from gcvit.monitoring.norms import Norms
from gcvit.monitoring.profiler import Profiler
from gcvit.monitoring.sample_grid import SampleGrid
from gcvit.monitoring.step_timer import StepTimer
from gcvit.optim.adamw import MODEL
from gcvit.optim.lr_schedule import Schedule, build_schedule, is_time, to_samples, to_steps
from gcvit.parallel.build import build_engine
from gcvit.parallel.engine import Engine
from gcvit.planning.micro_batch_finder import resolve_micro_batch
from gcvit.runtime.distributed import World
from gcvit.runtime.log import log_to
from gcvit.runtime.run_lock import RunLock
from gcvit.training.ema import Ema, all_fragments
from gcvit.training.resume import load_weights, restore
from gcvit.training.trainer import Intervals, Trainer, log_saves

logger = logging.getLogger(__name__)

_MUCH_MEMORY = 1_000_000_000  # bytes of a process that are worth a warning


@contextmanager
def build_trainer(
    config: Config,
    world: World,
    sources: tuple[Source, Source],
    *,
    resume: str = "auto",
    init_from: str | None = None,
    reset_head: bool = False,
    messages: Sequence[str] = (),
    log_to_files: bool = True,
) -> Iterator[Trainer]:
    """Build a trainer, resumed from its checkpoint if there is one, and hold the lock of the run folder while inside.

    Every rank calls it.

    Args:
        sources: The training and the validation set.
        resume: "auto", "none" or a path, as `--resume` of `train.py`; so are `init_from` and `reset_head`.
        messages: Logged once the log is open.
        log_to_files: Whether each rank logs to a file in the run folder; rank 0 logs to stderr in any case.

    Raises:
        UserError: On all ranks alike.
    """
    train_source, val_source = sources
    for source in sources:
        check_world(source.num_samples, world.size)  # before anything is built or written
    length = {"global_batch_size": config.global_batch_size, "samples_per_epoch": train_source.num_samples}
    schedule = build_schedule(config.schedule, config.optim, **length)
    intervals = Intervals(
        log=to_steps(config.trainer.log_every, **length),
        evaluate=to_steps(config.trainer.eval_every, **length),
        save=to_steps(config.trainer.save_every, **length),
    )
    profiler = Profiler(config.trainer, config.run_dir / "profile", world, schedule.total_steps)
    with ExitStack() as stack:
        lock = RunLock(config.run_dir)
        world.on_rank0(lambda: stack.enter_context(lock) and None)  # the lock itself cannot be broadcast
        found, corrupt = resolve.open_latest_valid(config.run_dir, resume, world)
        check_weights(config.optim, found, init_from, reset_head)
        messages = list(messages)
        config = resolve_micro_batch(config, world, found.info if found else None, messages)
        batch_plan = BatchPlan.from_config(config, world.size, config.trainer.resolved_micro_batch_size)
        micro_steps = batch_plan.num_micro_steps
        engine = build_engine(config, world, num_micro_steps=micro_steps, notices=messages)
        ema = build_ema(config.ema, engine, length) if config.ema else None
        state, changes = load_state(found, init_from, reset_head, engine, ema, config, train_source)
        messages += changes
        warnings = world.on_rank0(lambda: resolve.quarantine(corrupt))
        check_length(state, schedule)
        stream = train_stream(
            train_source,
            config,
            batch_plan,
            start_step=state.step,
            rank=world.rank,
            pin_memory=world.device.type == "cuda",
        )
        world.on_rank0(lambda: resolve.write_config(config))
        has_files = log_to_files and state.step < schedule.total_steps  # the folder of a finished run stays as it is
        stack.enter_context(log_to(config.run_dir / "logs" if has_files else None, world.rank))
        environment = describe_environment(config, world, micro_steps=micro_steps)
        costs = {"train_flops": environment["train_flops_per_image"], "peak_flops": environment["peak_flops"]}
        metrics = MetricLogger(config, world, first_step=state.step, total_steps=schedule.total_steps, **costs)
        stack.push(lambda error, *_: metrics.close(finished=error is None))
        for line in (*messages, describe(config, world, train_source, schedule, batch_plan, state.step)):
            logger.info(line)
        for line in (*warnings, *find_warnings(config, world, train_source, batch_plan, state.step)):
            logger.warning(line)
        folder = resolve.checkpoints_of(config.run_dir)
        keep = config.trainer.keep_checkpoints
        checkpoints = CheckpointManager(folder, world, keep=keep, check_lock=lock.check)
        stack.push(lambda error, *_: end_saves(checkpoints, metrics, after_error=error is not None))
        checkpoints.begin(state, all_fragments(engine, ema))
        metrics.log_start(state.step, {**environment, "samples": state.samples})
        stack.callback(profiler.close)

        def is_shown(step: int) -> bool:
            return step == 1 or is_time(step, intervals.evaluate, schedule.total_steps)

        yield Trainer(
            config=config,
            world=world,
            train_source=train_source,
            val_source=val_source,
            schedule=schedule,
            intervals=intervals,
            stream=stream,
            augment=DeviceAugment(config.augment, config.data, num_classes=config.model.num_classes, seed=config.seed),
            engine=engine,
            ema=ema,
            state=state,
            checkpoints=checkpoints,
            metrics=metrics,
            corruption=CorruptionBudget(train_source.num_samples, config.data.max_corrupt_fraction),
            timer=StepTimer(world.device),
            sample_grid=SampleGrid(
                config.run_dir / "samples",
                train_source,
                config.data,
                config.augment,
                config.model.num_classes,
                lambda step: world.is_rank0 and is_shown(step),
            ),
            norms=Norms(engine, config.optim, is_shown),
            profiler=profiler,
        )


def end_saves(checkpoints: CheckpointManager, metrics: MetricLogger, *, after_error: bool) -> None:
    """Wait for the checkpoint that is being written, and log it. Raises: as `CheckpointManager.close`."""
    if after_error:
        for message in checkpoints.abandon():
            logger.error(message)
    else:
        log_saves(metrics, checkpoints.close())


def check_weights(optim: OptimConfig, found: Checkpoint | None, init_from: str | None, reset_head: bool) -> None:
    """Check that weights are given if a flag or option needs them.

    Args:
        found: The checkpoint to resume, if there is one.

    Raises:
        UserError: A flag or option needs weights, and none are given.
    """
    if reset_head and not init_from:
        raise UserError("--reset-head without weights", hint="add --init-from, or leave it out: heads begin anew")
    if optim.frozen_backbone and not found and not init_from:
        raise UserError(
            "optim.frozen_backbone would freeze initial weights",
            hint="give weights to fine-tune with --init-from, or set it to null",
        )


def check_length(state: RunState, schedule: Schedule) -> None:
    """Check that the schedule is not over.

    Raises:
        UserError: The checkpoint is past its end.
    """
    if state.step > schedule.total_steps:
        raise UserError(
            "the checkpoint is past the schedule's end",
            got=f"step {state.step}",
            expected=f"at most {schedule.total_steps} steps",
            hint="lengthen schedule.cosine or schedule.cooldown, or start another run with --init-from",
        )


def build_ema(ema: EmaConfig, engine: Engine, length: Mapping[str, int]) -> Ema:
    """Build the average of the engine's weights, which begins with the present ones.

    Args:
        length: The keyword arguments of `to_samples`.
    """
    half_life = to_samples(ema.half_life, **length)
    return Ema(engine.fragments()[MODEL], half_life_samples=half_life, global_batch_size=length["global_batch_size"])


def load_state(
    found: Checkpoint | None,
    init_from: str | None,
    reset_head: bool,
    engine: Engine,
    ema: Ema | None,
    config: Config,
    train: Source,
) -> tuple[RunState, list[str]]:
    """Load a checkpoint or given weights into the engine, which holds the seed's initial weights already.

    Returns:
        The state, and messages about it.

    Raises:
        UserError: As `restore` and `load_weights`.
    """
    if found:
        ignored = [f"--init-from is not needed: the run resumes from {found.path}"] if init_from else []
        state, changes = restore(found, engine, ema, config, train)
        return state, ignored + changes
    state = RunState()
    if init_from is None:
        return state, []
    description = load_weights(engine, init_from, reset_head, config.seed)
    if ema:
        ema.restart()
    state.initial_weights = engine.world.on_rank0(lambda: describe_origin(init_from))
    return state, [f"initial weights: {description}"]


def describe(
    config: Config, world: World, train: Source, schedule: Schedule, batch_plan: BatchPlan, first_step: int
) -> str:
    """Describe in one line what starts."""
    return (
        f"{config.tag}: {config.model.name} by {config.engine} on {world.size} x {world.device.type}, "
        f"{train.num_samples} images, {schedule.total_steps} steps of {config.global_batch_size} "
        f"in {batch_plan.num_micro_steps} micro-step(s), from step {first_step}"
    )


def find_warnings(config: Config, world: World, train: Source, batch_plan: BatchPlan, first_step: int) -> Iterator[str]:
    """Find options that cost memory or speed here, or have no effect, a line each."""
    data = config.data
    num_bytes = data.lanes * data.shuffle_chunks * data.chunk_bytes
    if train.is_chunked and num_bytes > _MUCH_MEMORY * world.size:
        yield f"the shuffle buffer takes up to {num_bytes / world.size / 1e9:.1f} GB in each process"
    if not batch_plan.holds_whole_lanes(data.lanes):
        yield (
            f"samples are read one by one: {world.size} processes do not divide data.lanes={data.lanes}, "
            f"or these not the global batch of {config.global_batch_size} (the samples are the same)"
        )
    lanes_here = data.lanes * num_local_ranks() // world.size
    needed = min(1.0, 2 * lanes_here / (len(train.first) - 1)) * int(train.length.sum(dtype=np.int64))
    if data.cache_bytes is not None and data.cache_bytes < needed:
        yield (
            f"data.cache_bytes={data.cache_bytes} is too little for the {lanes_here} lanes of this node, "
            f"which need {needed:.2g}: shards will be downloaded repeatedly; raise it, or start with fewer data.lanes"
        )
    if config.trainer.profiled_steps and config.trainer.profiled_steps[0] < first_step:
        yield f"trainer.profile={config.trainer.profile} begins before step {first_step}: nothing is profiled"
