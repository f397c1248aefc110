"""Assembles a run and trains it. The loop at the end of this file is the whole of training."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from gcvit import checkpoint, runfolder
from gcvit.checkpoint import RunState
from gcvit.config import Config
from gcvit.data.assignment import holds_whole_lanes
from gcvit.data.source import Source, open_source
from gcvit.data.stream import Batch, num_micro_steps, train_stream
from gcvit.data.transforms import DeviceAugment
from gcvit.ema import Ema
from gcvit.errors import UserError
from gcvit.evaluator import evaluate
from gcvit.loss import soft_target_loss
from gcvit.metrics import Metrics
from gcvit.model import VARIANTS, weights
from gcvit.model.variants import fetch_weights
from gcvit.parallel.build import build_engine
from gcvit.parallel.engine import MODEL, Engine, Fragments, fill
from gcvit.parallel.world import World
from gcvit.schedule import build_schedule, is_time, to_samples, to_steps


def open_sources(config: Config) -> tuple[Source, Source]:
    """The train and val split of `data.dir`. Errors: UserError for missing or damaged data, or other classes."""
    if config.data.dir is None:
        raise UserError("no data", cure="give --data_dir DIR, a folder with train/ and val/")
    train, val = (open_source(config.data.dir, split) for split in ("train", "val"))
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


def train(
    config: Config,
    world: World,
    sources: tuple[Source, Source],
    *,
    resume: str,
    init_from: str | None,
    notices: Sequence[str] = (),
) -> RunState:
    """Train until the schedule's end and return the final state. Every rank calls it."""
    with runfolder.locked(config.run_dir) if world.is_first else nullcontext():
        return _train(config, world, sources, resume=resume, init_from=init_from, notices=notices)


def _train(
    config: Config,
    world: World,
    sources: tuple[Source, Source],
    *,
    resume: str,
    init_from: str | None,
    notices: Sequence[str] = (),
) -> RunState:
    source, val = sources
    batch_size = config.global_batch_size
    length = {"global_batch_size": batch_size, "samples_per_epoch": source.num_samples}
    schedule = build_schedule(config.schedule, config.optim, **length)
    log_every, eval_every, save_every = (
        to_steps(every, **length)
        for every in (config.trainer.log_every, config.trainer.eval_every, config.trainer.save_every)
    )
    paired = config.augment.mix is not None
    micro_steps = num_micro_steps(batch_size, world.size, config.trainer.micro_batch_size, paired)

    found = world.on_first(lambda: runfolder.choose_checkpoint(config.run_dir, resume))
    engine = build_engine(config, world, num_micro_steps=micro_steps)
    if init_from and not found:
        notices = [*notices, f"initial weights: {load_weights(engine, init_from)}"]
    ema = None
    if config.ema:
        ema = Ema(
            engine.fragments()[MODEL],
            half_life_samples=to_samples(config.ema.half_life, **length),
            global_batch_size=batch_size,
        )
    state = restore(found, engine, ema, config, source, world) if found else RunState()
    if world.is_first:
        runfolder.write_config(config)
    metrics = Metrics(config, world, first_step=state.step, total_steps=schedule.total_steps)
    for notice in notices:
        metrics.say(notice)
    metrics.say(
        f"{config.tag}: {config.model.name} by {config.engine} on {world.size} x {world.device.type}, "
        f"{source.num_samples} images, {schedule.total_steps} steps of {batch_size} "
        f"in {micro_steps} micro-step(s), from step {state.step}"
    )
    if not holds_whole_lanes(batch_size, world.size, lanes=config.data.lanes, paired=paired):
        metrics.say(
            f"reads are not sequential: {world.size} processes do not divide data.lanes={config.data.lanes}, or these "
            f"not the global batch of {batch_size} (the samples are the same, only the disk works more)"
        )
    augment = DeviceAugment(config.augment, config.data, num_classes=config.model.num_classes, seed=config.seed)
    stream = train_stream(
        source,
        config,
        start_step=state.step,
        world_size=world.size,
        rank=world.rank,
        micro_batch_size=config.trainer.micro_batch_size,
        pin_memory=world.device.type == "cuda",
    )

    for step, batches in enumerate(islice(stream, schedule.total_steps - state.step), start=state.step):
        loss_sum = torch.zeros((), device=world.device)
        engine.module.train()
        for micro_step, (images, targets) in enumerate(on_device(batches, augment, step, config, world)):
            seed_drop_path(config.seed, step, micro_step, world.rank)
            loss = soft_target_loss(engine(images), targets).sum()
            engine.backward(loss)
            loss_sum += loss.detach()
        lr = schedule.lr(step)
        result = engine.step(lr)
        if ema:
            ema.update()
        metrics.add(loss_sum, result)

        state.step, state.samples = step + 1, state.samples + batch_size
        if is_time(state.step, log_every, schedule.total_steps):
            metrics.log_step(state.step, lr, result)
        is_best = is_time(state.step, eval_every, schedule.total_steps) and evaluate_all(
            engine, ema, val, config, state, metrics, world
        )
        if is_best or is_time(state.step, save_every, schedule.total_steps):
            save(engine, ema, config, state, source, world)
    metrics.close()
    return state


def on_device(
    batches: tuple[Batch, ...], augment: DeviceAugment, step: int, config: Config, world: World
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images [b, 3, H, W] and soft targets [b, C] of each micro-step, on the device.

    A rank without samples takes part with one black image whose target is all zero: its loss and gradients are zero.
    """
    for batch in batches:
        if len(batch.labels):
            yield augment(batch, step, world.device)
        else:
            size = config.model.img_size
            yield (
                torch.zeros(1, 3, size, size, device=world.device),
                torch.zeros(1, config.model.num_classes, device=world.device),
            )


def seed_drop_path(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Make what the model draws depend on (seed, step, micro-step, rank) alone, so that a resume draws the same."""
    digest = hashlib.blake2b(repr((seed, step, micro_step, rank)).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest))


def load_weights(engine: Engine, source: str) -> str:
    """Start from given weights (`--init-from`) and say what was found; moments, EMA and schedule start afresh.

    `source` is a file of any layout, a run folder or checkpoint of ours (its EMA where it has one), or the name of a
    variant, whose published weights are fetched. Errors: UserError for what is none of these, or another model.
    """
    if Path(source).is_dir():
        found = checkpoint.open_checkpoint(runfolder.find_checkpoint(Path(source)))
        kind = "ema" if checkpoint.has_kind(found, "ema") else MODEL
        parts = engine.fragments()[MODEL]
        checkpoint.load(found, {kind: parts}, engine.world)
        description = f"{found.path}: {kind}"
    else:
        path = fetch_weights(source) if source in VARIANTS else source
        state, description = weights.read_fitting(engine.module, path)
        description += " (published under CC-BY-NC-SA-4.0: not for commercial use)" if source in VARIANTS else ""
        fill(engine.fragments()[MODEL], lambda name: state[name])
    engine.refresh()
    return description


def evaluate_all(
    engine: Engine,
    ema: Ema | None,
    val: Source,
    config: Config,
    state: RunState,
    metrics: Metrics,
    world: World,
) -> bool:
    """Evaluate the weights and their EMA on val; true where the best so far (the EMA's, if there is one) was beaten."""
    engine.module.eval()
    top1 = 0.0
    for name, place in (("weights", nullcontext()), *((("ema", ema.swapped_in(engine)),) if ema else ())):
        with place:
            result = evaluate(
                engine,
                val,
                config.data,
                world,
                img_size=config.model.img_size,
                batch_size=config.trainer.eval_batch_size,
            )
        metrics.log_evaluation(state.step, name, result.as_dict())
        top1 = result.top1
    metrics.restart_clock()
    if top1 <= state.best_top1:
        return False
    state.best_top1, state.best_step = top1, state.step
    return True


def all_fragments(engine: Engine, ema: Ema | None) -> dict[str, Fragments]:
    return engine.fragments() | ({"ema": ema.fragments} if ema else {})


def save(engine: Engine, ema: Ema | None, config: Config, state: RunState, source: Source, world: World) -> None:
    """Write a checkpoint by all ranks together, then delete old ones."""
    state.updates = engine.updates()
    state.ema_updates = ema.updates if ema else 0
    folder = runfolder.checkpoints_of(config.run_dir)
    info = {"config": config.model_dump(mode="json"), "data": source.digest, "world_size": world.size}
    checkpoint.save(folder, state, all_fragments(engine, ema), info, world)
    if world.is_first:
        checkpoint.prune(folder, keep=config.trainer.keep_checkpoints, best_step=state.best_step)


def restore(path: Path, engine: Engine, ema: Ema | None, config: Config, source: Source, world: World) -> RunState:
    """Go on from a checkpoint of any engine and world size. Errors: UserError where it is another run's."""
    found = checkpoint.open_checkpoint(path)
    if found.info["data"] != source.digest:
        raise UserError(
            "the checkpoint was trained on other data",
            got=path,
            cure="give that data, or use --init-from in a new run",
        )
    if found.info["config"]["seed"] != config.seed:
        raise UserError("the checkpoint has another seed", got=found.info["config"]["seed"], allowed=config.seed)
    state = found.state
    if state.samples % config.global_batch_size:
        raise UserError(
            "global_batch_size does not divide the samples that the checkpoint has seen",
            got=config.global_batch_size,
            allowed=f"a divisor of {state.samples}, such as {found.info['config']['global_batch_size']}",
        )
    state.step = state.samples // config.global_batch_size
    kinds = all_fragments(engine, ema)
    ema_is_new = ema is not None and not checkpoint.has_kind(found, "ema")
    if ema_is_new:
        kinds.pop("ema")
    checkpoint.load(found, kinds, world)
    engine.refresh()
    engine.set_updates(state.updates)
    if ema and ema_is_new:
        ema.restart()
    elif ema:
        ema.updates = state.ema_updates
    return state
