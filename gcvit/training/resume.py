"""Load a run's weights: resume from a checkpoint of any engine, or start from given weights."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gcvit.checkpoint import resolve, store
from gcvit.checkpoint.store import Checkpoint, RunState
from gcvit.config.schema import Config
from gcvit.data.source import Source
from gcvit.errors import UserError
from gcvit.model import VARIANTS, weights
from gcvit.model.fitting import fit
from gcvit.model.variants import fetch_weights
from gcvit.optim.adamw import MODEL
from gcvit.parallel.engine import Engine, fill
from gcvit.runtime.distributed import World
from gcvit.training.ema import Ema, all_fragments


def restore(
    found: Checkpoint, engine: Engine, ema: Ema | None, config: Config, train: Source
) -> tuple[RunState, list[str]]:
    """Resume from a checkpoint of any engine and world size.

    Returns:
        The state, and messages about what has changed in the config.

    Raises:
        UserError: The checkpoint belongs to another run, or an option changed that must not change within a run.
    """
    if found.info["data"] != train.digest:
        raise UserError(
            "the checkpoint was trained on other data",
            got=found.path,
            hint="give that data, or start another run with --init-from",
        )
    if found.info["config"]["seed"] != config.seed:
        raise UserError(
            "the checkpoint has another seed", got=config.seed, expected=found.info["config"]["seed"], hint="set seed"
        )
    state = found.state
    was = found.info["config"]["data"]
    order = {name: was[name] for name in ("lanes", "chunk_bytes", "shuffle_chunks")}
    if state.samples % train.num_samples and any(getattr(config.data, name) != value for name, value in order.items()):
        raise UserError(
            "another order of samples in the middle of an epoch, of which some would be skipped and some repeated",
            got=", ".join(f"data.{name}={getattr(config.data, name)}" for name in order),
            expected=", ".join(f"data.{name}={value}" for name, value in order.items()),
            hint="set them back, or start another run with --init-from",
        )
    if state.samples % config.global_batch_size:
        raise UserError(
            "global_batch_size does not divide the samples that the checkpoint has seen",
            got=config.global_batch_size,
            expected=f"a divisor of {state.samples}, such as {found.info['config']['global_batch_size']}",
        )
    if found.path.parent.resolve() != resolve.checkpoints_of(config.run_dir).resolve():
        state.best_top1, state.best_step = -1.0, -1  # the best lies in the other run's folder
    elif config.global_batch_size != found.info["config"]["global_batch_size"]:
        raise UserError(
            "another global batch would number the steps of this folder anew",
            got=config.global_batch_size,
            expected=found.info["config"]["global_batch_size"],
            hint=f"go on in another run: --tag NAME --resume {found.path}",
        )
    elif ema is None and store.has_kind(found, "ema"):
        raise UserError(
            "the run has an EMA, which would be lost",
            got="ema=null",
            hint=f"keep ema (--model-ema), or go on in another run: --tag NAME --resume {found.path}",
        )
    state.step = state.samples // config.global_batch_size
    kinds = all_fragments(engine, ema)
    ema_is_new = ema is not None and not store.has_kind(found, "ema")
    if ema_is_new:
        kinds.pop("ema")
    store.load(found, kinds, engine.world)
    engine.refresh()
    engine.set_counters(state.counters)
    if ema and ema_is_new:
        ema.restart()
    elif ema:
        ema.updates = state.ema_updates
    changes = list_differences(found.info["config"], config.model_dump(mode="json"))
    return state, [
        f"changed since {found.path.name}: {x}" for x in changes if not x.startswith(("tag ", "output_dir "))
    ]


def list_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the options in which two configs, as plain values, differ: "optim.lr 0.001 -> 0.0005"."""
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += list_differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} {a} -> {b}")
    return found


def load_weights(engine: Engine, source: str, reset_head: bool = False, seed: int = 0) -> str:
    """Load given weights (`--init-from`) into an engine and describe them; moments, EMA and schedule start afresh.

    Bias tables of other windows are resampled.

    Args:
        source: A file of any layout, a run folder or checkpoint of ours (its EMA if it has one), or the name of a
            variant, whose published weights are fetched.
        reset_head: Keep the seed's initial weights in the head, so that it may have other classes.

    Raises:
        UserError: The source is none of these, or of another model.
    """
    module, change = engine.module, {"reset_head": reset_head, "resample": True}
    if Path(source).is_dir():
        found = engine.world.on_rank0(lambda: store.open_checkpoint(resolve.find_checkpoint(Path(source))))
        found = store.check(found, engine.world)
        kind = "ema" if store.has_kind(found, "ema") else MODEL
        state, changes = fit(store.read_tensors(found, kind), module, found.path, **change)
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
    """Check that all ranks find the same content under a path.

    Raises:
        UserError: The contents differ; raised on all ranks.
    """
    with open(path, "rb") as file:
        digests = world.gather(hashlib.file_digest(file, "sha256").hexdigest())
    differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        raise UserError(
            "processes find other weights under the same name",
            got=f"{path}, which for rank {differing[0]} is another file than for rank 0",
            hint="copy one file to all nodes, or put it on a disk that they share",
        )
