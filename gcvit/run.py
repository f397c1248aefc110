"""A run: all that a training consists of, how it starts, is evaluated, saved and resumed. The loop is `trainer.py`."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gcvit import checkpoint, runfolder
from gcvit.card import describe_origin
from gcvit.checkpoint import Checkpoint, RunState
from gcvit.config import Config
from gcvit.damage import DamageBudget
from gcvit.data.assignment import holds_whole_lanes
from gcvit.data.source import Source, num_local_ranks, open_source
from gcvit.data.stream import Batch, check_world, num_micro_steps, train_stream
from gcvit.data.transforms import DeviceAugment
from gcvit.ema import Ema
from gcvit.errors import UserError
from gcvit.evaluator import Result, evaluate
from gcvit.metrics import Metrics
from gcvit.model import VARIANTS, weights
from gcvit.model.fitting import fit
from gcvit.model.variants import fetch_weights
from gcvit.monitoring.norms import Norms
from gcvit.monitoring.profiling import Profiler
from gcvit.monitoring.samples import Samples
from gcvit.monitoring.stalls import StepClock
from gcvit.monitoring.surroundings import describe_surroundings
from gcvit.parallel.build import build_engine
from gcvit.parallel.engine import MODEL, Engine, Fragments, StepResult, fill
from gcvit.parallel.world import World
from gcvit.planning.micro_batch import settle_micro_batch
from gcvit.runlock import RunLock
from gcvit.saver import Saver
from gcvit.schedule import Schedule, build_schedule, is_time, to_samples, to_steps

_MUCH_MEMORY = 1_000_000_000  # bytes of a process that are worth a word


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
    damage: DamageBudget
    clock: StepClock
    samples: Samples
    norms: Norms
    profiler: Profiler


def open_sources(config: Config) -> tuple[Source, Source]:
    """The train and val split of `data.dir`. Errors: UserError for missing or damaged data, or other classes."""
    if config.data.dir is None:
        raise UserError("no data", cure="give --data_dir DIR, a folder with train/ and val/")
    data = config.data
    train, val = (open_source(config.data.dir, split, data.cache_dir, data.cache_bytes) for split in ("train", "val"))
    for source, split in ((train, "train"), (val, "val")):
        if len(source.classes) != config.model.num_classes:
            raise UserError(
                f"the data has another number of classes than the model ({split})",
                got=f"{len(source.classes)} classes in {config.data.dir}",
                allowed=f"model.num_classes={config.model.num_classes}",
                cure=f"set model.num_classes={len(source.classes)}, or give other data",
            )
    if train.classes != val.classes:
        differing = sorted(set(train.classes) ^ set(val.classes))[:3]
        raise UserError("train and val have different classes", got=", ".join(differing))
    return train, val


@contextmanager
def start(
    config: Config,
    world: World,
    sources: tuple[Source, Source],
    resume: str = "auto",
    init_from: str | None = None,
    reset_head: bool = False,
    notices: Sequence[str] = (),
) -> Iterator[Run]:
    """Build a run, or bring it back from its checkpoint, and hold the lock of its folder while it lasts.

    Every rank calls it. `resume`, `init_from` and `reset_head` are the flags of `train.py`. Errors: UserError, on all
    ranks alike.
    """
    train, val = sources
    for source in sources:
        check_world(source, world.size)  # before anything is built or written
    length = {"global_batch_size": config.global_batch_size, "samples_per_epoch": train.num_samples}
    schedule = build_schedule(config.schedule, config.optim, **length)
    trainer = config.trainer
    profiler = Profiler(config, world, schedule.total_steps)
    every = Intervals(*(to_steps(x, **length) for x in (trainer.log_every, trainer.eval_every, trainer.save_every)))
    with ExitStack() as stack:
        lock = RunLock(config.run_dir)
        world.on_first(lambda: stack.enter_context(lock) and None)  # nothing that the others could be told
        found, damaged = runfolder.open_sound(config.run_dir, resume, world)
        notices = list(notices)
        config = settle_micro_batch(config, world, found.info if found else None, notices)
        micro_batch_size, paired = config.trainer.settled_micro_batch_size, config.augment.mix is not None
        micro_steps = num_micro_steps(config.global_batch_size, world.size, micro_batch_size, paired)
        if reset_head and not init_from:
            raise UserError("--reset-head without weights", cure="add --init-from, or leave it out: heads begin anew")
        if config.optim.frozen_backbone and not found and not init_from:
            raise UserError(
                "optim.frozen_backbone would freeze initial weights",
                cure="give weights to fine-tune with --init-from, or set it to null",
            )
        engine = build_engine(config, world, num_micro_steps=micro_steps, notices=notices)
        if init_from and found:
            notices.append(f"--init-from is not needed: the run goes on from {found.path}")
        elif init_from:
            notices.append(f"initial weights: {load_weights(engine, init_from, reset_head, config.seed)}")
        ema = None
        if config.ema:
            half_life = to_samples(config.ema.half_life, **length)
            ema = Ema(
                engine.fragments()[MODEL],
                half_life_samples=half_life,
                global_batch_size=config.global_batch_size,
            )
        state = RunState()
        if init_from and not found:
            state.initial_weights = world.on_first(lambda: describe_origin(init_from))
        if found:
            state, changes = restore(found, engine, ema, config, train)
            notices += [*changes, *world.on_first(lambda: runfolder.set_aside(damaged))]
        if state.step > schedule.total_steps:
            raise UserError(
                "the checkpoint is past the schedule's end",
                got=f"step {state.step}",
                allowed=f"at most {schedule.total_steps} steps",
                cure="lengthen schedule.cosine or schedule.cooldown, or start another run with --init-from",
            )
        stream = train_stream(
            train,
            config,
            start_step=state.step,
            world_size=world.size,
            rank=world.rank,
            micro_batch_size=micro_batch_size,
            pin_memory=world.device.type == "cuda",
        )
        augment = DeviceAugment(config.augment, config.data, num_classes=config.model.num_classes, seed=config.seed)
        world.on_first(lambda: runfolder.write_config(config))
        surroundings = describe_surroundings(config, world, micro_steps=micro_steps)
        costs = {"train_flops": surroundings["train_flops_per_image"], "peak_flops": surroundings["peak_flops"]}
        metrics = Metrics(config, world, first_step=state.step, total_steps=schedule.total_steps, **costs)
        stack.callback(metrics.close)
        for notice in notices:
            metrics.say(notice)
        metrics.say(
            f"{config.tag}: {config.model.name} by {config.engine} on {world.size} x {world.device.type}, "
            f"{train.num_samples} images, {schedule.total_steps} steps of {config.global_batch_size} "
            f"in {micro_steps} micro-step(s), from step {state.step}"
        )
        num_bytes = config.data.lanes * config.data.open_runs * config.data.run_bytes
        if train.in_runs and num_bytes > _MUCH_MEMORY * world.size:
            metrics.say(f"the runs that are open take up to {num_bytes / world.size / 1e9:.1f} GB in each process")
        if not holds_whole_lanes(config.global_batch_size, world.size, lanes=config.data.lanes, paired=paired):
            metrics.say(
                f"samples are read one by one: {world.size} processes do not divide data.lanes={config.data.lanes}, "
                f"or these not the global batch of {config.global_batch_size} (the samples are the same)"
            )
        lanes_here = config.data.lanes * num_local_ranks() // world.size
        wanted = min(1.0, 2 * lanes_here / (len(train.first) - 1)) * int(train.length.sum(dtype=np.int64))
        if config.data.cache_bytes is not None and config.data.cache_bytes < wanted:
            metrics.say(
                f"data.cache_bytes={config.data.cache_bytes} is too little for the {lanes_here} lanes of this node, "
                f"which want {wanted:.2g}: shards will come again and again; raise it, or start with fewer data.lanes"
            )
        damage = DamageBudget(train.num_samples, config.data.max_damaged_fraction)
        folder = runfolder.checkpoints_of(config.run_dir)
        saver = Saver(folder, world, metrics, keep=trainer.keep_checkpoints, check_lock=lock.check)
        metrics.say(saver.begin(state, all_fragments(engine, ema)))
        metrics.log_start(state.step, {**surroundings, "samples": state.samples})
        stack.push(saver)
        if trainer.profiled_steps and trainer.profiled_steps[0] < state.step:
            metrics.say(f"trainer.profile={trainer.profile} begins before step {state.step}: nothing is profiled")
        stack.callback(profiler.close)

        def is_shown(step: int) -> bool:
            return step == 1 or is_time(step, every.evaluate, schedule.total_steps)

        samples = Samples(config, train, is_shown)
        norms = Norms(engine, config.optim, is_shown)
        yield Run(
            *(config, world, train, val, schedule, every, stream, augment, engine, ema, state, saver, metrics, damage),
            *(StepClock(world.device), samples, norms, profiler),
        )


def log_step(run: Run, lr: float, result: StepResult) -> None:
    """A row of metrics, and what is shown now and then beside it: sample images, norms of weights and gradients."""
    run.metrics.log_step(run.state.step, lr, result, run.clock.take(run.world.barrier), len(run.damage.found))
    if run.world.is_first:
        run.samples.write(run.metrics)
    run.norms.log(run.metrics)


def settle_damage(run: Run) -> None:
    """Tell of the samples that any rank had to replace. Errors: UserError, on all ranks alike, past the budget."""
    run.metrics.log_damage(run.state.step, run.damage.settle(run.world), len(run.damage.found))
    run.damage.check()


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
                skip_damaged=True,  # said and counted; an error here would throw away what was just trained
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
    path = runfolder.checkpoints_of(run.config.run_dir) / f"step_{run.state.step:08d}"
    if run.world.on_first(path.exists):
        run.world.on_first(lambda: checkpoint.restate(path, run.state))
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


def restore(
    found: Checkpoint, engine: Engine, ema: Ema | None, config: Config, train: Source
) -> tuple[RunState, list[str]]:
    """Go on from a checkpoint of any engine and world size; returns the state, and how the config has changed.

    Errors: UserError where it is another run's, or would not be the same run any more.
    """
    if found.info["data"] != train.digest:
        raise UserError(
            "the checkpoint was trained on other data",
            got=found.path,
            cure="give that data, or start another run with --init-from",
        )
    if found.info["config"]["seed"] != config.seed:
        raise UserError(
            "the checkpoint has another seed", got=config.seed, allowed=found.info["config"]["seed"], cure="set seed"
        )
    state = found.state
    was = found.info["config"]["data"]
    order = {name: was[name] for name in ("lanes", "run_bytes", "open_runs")}
    if state.samples % train.num_samples and any(getattr(config.data, name) != value for name, value in order.items()):
        raise UserError(
            "another order of samples in the middle of an epoch, of which some would be skipped and some repeated",
            got=", ".join(f"data.{name}={getattr(config.data, name)}" for name in order),
            allowed=", ".join(f"data.{name}={value}" for name, value in order.items()),
            cure="set them back, or start another run with --init-from",
        )
    if state.samples % config.global_batch_size:
        raise UserError(
            "global_batch_size does not divide the samples that the checkpoint has seen",
            got=config.global_batch_size,
            allowed=f"a divisor of {state.samples}, such as {found.info['config']['global_batch_size']}",
        )
    if found.path.parent.resolve() != runfolder.checkpoints_of(config.run_dir).resolve():
        state.best_top1, state.best_step = -1.0, -1  # the best lies in the other run's folder
    elif config.global_batch_size != found.info["config"]["global_batch_size"]:
        raise UserError(
            "another global batch would number the steps of this folder anew",
            got=config.global_batch_size,
            allowed=found.info["config"]["global_batch_size"],
            cure=f"go on in another run: --tag NAME --resume {found.path}",
        )
    elif ema is None and checkpoint.has_kind(found, "ema"):
        raise UserError(
            "the run has an EMA, which would be lost",
            got="ema=null",
            cure=f"keep ema (--model-ema), or go on in another run: --tag NAME --resume {found.path}",
        )
    state.step = state.samples // config.global_batch_size
    kinds = all_fragments(engine, ema)
    ema_is_new = ema is not None and not checkpoint.has_kind(found, "ema")
    if ema_is_new:
        kinds.pop("ema")
    checkpoint.load(found, kinds, engine.world)
    engine.refresh()
    engine.set_counters(state.counters)
    if ema and ema_is_new:
        ema.restart()
    elif ema:
        ema.updates = state.ema_updates
    changes = checkpoint.differences(found.info["config"], config.model_dump(mode="json"))
    return state, [
        f"changed since {found.path.name}: {x}" for x in changes if not x.startswith(("tag ", "output_dir "))
    ]


def load_weights(engine: Engine, source: str, reset_head: bool = False, seed: int = 0) -> str:
    """Start from given weights (`--init-from`) and say what was found; moments, EMA and schedule start afresh.

    `source` is a file of any layout, a run folder or checkpoint of ours (its EMA where it has one), or the name of a
    variant, whose published weights are fetched. Bias tables of other windows are resampled. With `reset_head` the
    head keeps the seed's initial weights, so that it may have other classes. Errors: UserError for what is none of
    these, or another model.
    """
    module, change = engine.module, {"reset_head": reset_head, "resample": True}
    if Path(source).is_dir():
        found = engine.world.on_first(lambda: checkpoint.open_checkpoint(runfolder.find_checkpoint(Path(source))))
        found = checkpoint.check(found, engine.world)
        kind = "ema" if checkpoint.has_kind(found, "ema") else MODEL
        state, changes = fit(checkpoint.read_tensors(found, kind), module, found.path, **change)
        description = ", ".join([f"{found.path}: {kind}", *changes])
    else:
        path = fetch_weights(source) if source in VARIANTS else source
        state, description = weights.read_fitting(module, path, **change)
        check_alike(path, engine.world)
        description += " (published under CC-BY-NC-SA-4.0: not for commercial use)" if source in VARIANTS else ""
    fill(engine.fragments()[MODEL], lambda name: state[name] if name in state else module.initial_value(name, seed))
    engine.refresh()
    return description


def check_alike(path: str | Path, world: World) -> None:
    """Errors: UserError, on all ranks alike, where the ranks find other content under the same path."""
    with open(path, "rb") as file:
        digests = world.gather(hashlib.file_digest(file, "sha256").hexdigest())
    differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        raise UserError(
            "processes find other weights under the same name",
            got=f"{path}, which for rank {differing[0]} is another file than for rank 0",
            cure="copy one file to all nodes, or put it on a disk that they share",
        )


def all_fragments(engine: Engine, ema: Ema | None) -> dict[str, Fragments]:
    return engine.fragments() | ({"ema": ema.fragments} if ema else {})
