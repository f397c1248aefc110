"""One checkpoint for all engines and world sizes, both ways.

A checkpoint is a folder `step_N`: a `torch.distributed.checkpoint` directory that holds tensors only, each stored flat
under its name ("model.head.weight", "exp_avg...", "exp_avg_sq...", "ema..."), and a readable `state.json`. Stored flat,
what a rank holds under any engine is a contiguous range: rows under FSDP2, a cut through a matrix under ZeRO, a whole
replica under DDP, which then writes its part of it. Written to `step_N.tmp`, flushed, renamed by rank 0: a folder
under its final name is complete. No pickle from a file is executed: tensors are read with `weights_only`, DCP's
metadata through an allow-list.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from gcvit.errors import UserError
from gcvit.flat_dcp import METADATA_FILE, read_fragments, write_fragments
from gcvit.parallel.engine import Counters, Fragment, Fragments
from gcvit.parallel.world import World

STATE_FILE = "state.json"
FORMAT = 2


@dataclass
class RunState:
    """Everything about a run that changes while it runs, beside its tensors: what is not here does not survive."""

    step: int = 0
    samples: int = 0  # consumed; with the seed, the place in the order
    counters: Counters = field(default_factory=Counters)
    ema_updates: int = 0
    best_top1: float = -1.0  # percent; the EMA's where there is one
    best_step: int = -1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk: its folder and what `state.json` says."""

    path: Path
    state: RunState
    info: Mapping[str, Any]  # "config" as plain values, "data" (its digest), "world_size"
    shapes: Mapping[str, torch.Size]  # of every stored tensor, by name
    files: Mapping[str, Mapping[str, Any]]  # bytes and sha256 of every file but state.json, by name


def save(
    folder: Path, state: RunState, tensors: Mapping[str, Fragments], info: Mapping[str, Any], world: World
) -> Path:
    """Write `folder/step_N` by all ranks together, and return it once it is complete and on disk."""
    final = folder / f"step_{state.step:08d}"
    part = final.with_name(final.name + ".tmp")
    if world.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.tmp"):  # of a save that was killed; the run's lock makes this one alone
            shutil.rmtree(stale)
    world.barrier()
    fragments = {f"{kind}.{name}": part for kind, parts in tensors.items() for name, part in parts.items()}
    write_fragments(part, fragments, world.host_group)
    written = [*part.glob(f"__{world.rank}_*"), *([part / METADATA_FILE] if world.is_first else [])]
    files = {path.name: _file_record(path) for path in written}
    shapes = {name: list(fragment.shape) for name, fragment in fragments.items()}
    files_of_ranks, shapes_of_ranks = world.gather(files), world.gather(shapes)
    if world.is_first:
        content = {
            "format": FORMAT,
            "state": asdict(state),
            **info,
            "shapes": {name: shape for shapes in shapes_of_ranks for name, shape in shapes.items()},
            "files": {name: record for files in files_of_ranks for name, record in files.items()},
        }
        _write_durably(part / STATE_FILE, json.dumps(content, indent=1))
        assert not final.exists(), f"{final} is there: a run goes on from its newest checkpoint"
        os.rename(part, final)
        _sync(folder)
    world.barrier()
    return final


def prune(folder: Path, *, keep: int, best_step: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one. Called by one rank."""
    complete = sorted(folder.glob("step_" + "[0-9]" * 8))
    for path in complete[:-keep]:
        if int(path.name.removeprefix("step_")) != best_step:
            # Renamed first: a deletion that is cut off must not leave half a checkpoint under a complete name.
            doomed = path.with_name(path.name + ".tmp")
            path.rename(doomed)
            shutil.rmtree(doomed)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder of checkpoints, or None."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return max(found, key=lambda path: int(path.name.removeprefix("step_")), default=None)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read `state.json` and check that all files have their sizes. Errors: UserError naming the file."""
    cure = "use another checkpoint, or --resume none to start afresh"
    try:
        content = json.loads((path / STATE_FILE).read_text())
        if content["format"] != FORMAT:
            raise UserError(f"{path} has another format", got=content["format"], allowed=FORMAT, cure=cure)
        state = content.pop("state")
        state = RunState(**state | {"counters": Counters(**state.get("counters", {}))})
        shapes = {name: torch.Size(shape) for name, shape in content.pop("shapes").items()}
        files = content.pop("files")
    except FileNotFoundError:
        raise UserError("no checkpoint here", got=path, allowed=f"a folder with {STATE_FILE}", cure=cure) from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path / STATE_FILE}", got=repr(error), cure=cure) from None
    for name, record in files.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != record["bytes"]:
            got = "no such file" if size is None else f"{size} bytes"
            raise UserError(
                f"damaged checkpoint: {path / name}", got=got, allowed=f"{record['bytes']} bytes", cure=cure
            )
    return Checkpoint(path, state, content, shapes, files)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The knobs in which two configs, as plain values, differ: "optim.lr 0.001 -> 0.0005"."""
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} {a} -> {b}")
    return found


def has_kind(checkpoint: Checkpoint, kind: str) -> bool:
    """Whether the checkpoint holds tensors of a kind ("model", "exp_avg", "exp_avg_sq", "ema")."""
    return any(name.startswith(f"{kind}.") for name in checkpoint.shapes)


def load(checkpoint: Checkpoint, tensors: Mapping[str, Fragments], world: World) -> None:
    """Fill the fragments from a checkpoint that any engine at any world size wrote; all ranks together.

    Errors, on all ranks alike: UserError for a damaged file, and where the stored tensors of these kinds are not
    exactly those of the model.
    """
    wanted = {f"{kind}.{name}": part for kind, parts in tensors.items() for name, part in parts.items()}
    # A rank may hold nothing of a small tensor, so that only all ranks together know what the model has.
    of_ranks = world.gather({name: part.shape for name, part in wanted.items()})
    of_model = {name: shape for shapes in of_ranks for name, shape in shapes.items()}
    stored = {name: shape for name, shape in checkpoint.shapes.items() if name.split(".")[0] in tensors}
    wrong = sorted(name for name in of_model.keys() | stored.keys() if of_model.get(name) != stored.get(name))
    if wrong:
        raise UserError(
            f"{checkpoint.path} is a checkpoint of another model",
            got=f"{wrong[0]} of shape {_shape(stored.get(wrong[0]))}",
            allowed=f"shape {_shape(of_model.get(wrong[0]))} ({len(wrong)} of {len(of_model)} tensors differ)",
            cure="resume with the config of that run, or start afresh with another tag",
        )
    names = sorted(checkpoint.files)
    damage = world.gather(_find_damage(checkpoint, names[world.rank :: world.size]))
    _refuse_damage(damage)
    read_fragments(checkpoint.path, wanted, world.host_group)


def read_tensors(checkpoint: Checkpoint, kind: str) -> dict[str, torch.Tensor]:
    """All tensors of one kind ("model" or "ema"), whole, on the host, by a single process. Errors: as `load`."""
    _refuse_damage([_find_damage(checkpoint, checkpoint.files)])
    prefix = f"{kind}."
    shapes = {name: shape for name, shape in checkpoint.shapes.items() if name.startswith(prefix)}
    whole = {name: Fragment(torch.empty(shape.numel()), 0, shape) for name, shape in shapes.items()}
    read_fragments(checkpoint.path, whole, None)
    return {name.removeprefix(prefix): part.data.view(part.shape) for name, part in whole.items()}


def _shape(shape: torch.Size | None) -> str:
    return "nothing" if shape is None else str(tuple(shape))


def _find_damage(checkpoint: Checkpoint, names: Iterable[str]) -> str | None:
    """The first of these files whose content is not what was written, or None."""
    for name in names:
        if _file_record(checkpoint.path / name) != checkpoint.files[name]:
            return str(checkpoint.path / name)
    return None


def _refuse_damage(found: Iterable[str | None]) -> None:
    damaged = next((path for path in found if path), None)
    if damaged:
        raise UserError(
            f"damaged checkpoint: {damaged}",
            got="another SHA-256 than when it was written",
            cure="use another checkpoint, or --resume none to start afresh",
        )


def _file_record(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
