"""One checkpoint for all engines and world sizes, both ways.

A checkpoint is a folder `step_N`: a `torch.distributed.checkpoint` directory that holds tensors only, each stored flat
under its name ("model.head.weight", "exp_avg...", "exp_avg_sq...", "ema..."), and a readable `state.json`. Stored flat,
what a rank holds under any engine is a contiguous range: rows under FSDP2, a cut through a matrix under ZeRO, a whole
replica under DDP, which then writes its part of it.

Whole or not at all: the files are written to `step_N.tmp` and hashed on their way to the disk, flushed, and read back
from it. `state.json`, with their sizes and hashes and one of itself, comes last; then rank 0 renames the folder, and
only then old ones go. So a folder under its final name is complete, whenever a process is killed, and what a killed
one leaves is named `.tmp`, which the next run or save removes. `manager.py` does this beside the training.

Nothing is believed: sizes and hashes are checked before a tensor is touched. No pickle from a file is executed:
tensors are read with `weights_only`, DCP's metadata through an allow-list.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from gcvit.checkpoint.shard_files import FileRecord, HashedFiles, read_fragments, read_metadata, write_fragments
from gcvit.errors import UserError
from gcvit.optim.adamw import Counters
from gcvit.parallel.engine import Fragment, Fragments
from gcvit.runtime import heartbeat
from gcvit.runtime.distributed import World

STATE_FILE = "state.json"
FORMAT = 2

T = TypeVar("T")


@dataclass
class RunState:
    """Everything about a run that changes while it runs, beside its tensors: what is not here does not survive."""

    step: int = 0
    samples: int = 0  # consumed; with the seed, the place in the order
    counters: Counters = field(default_factory=Counters)
    ema_updates: int = 0
    best_top1: float = -1.0  # percent; the EMA's where there is one
    best_step: int = -1
    evaluation_due: bool = False  # of this step: it was preempted before that, or meanwhile
    initial_weights: str | None = None  # where --init-from had them from, in words; None: drawn from the seed


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk: its folder and what `state.json` says."""

    path: Path
    state: RunState
    info: Mapping[str, Any]  # "config" as plain values, "data" (its digest), "world_size", "classes"
    shapes: Mapping[str, torch.Size]  # of every stored tensor, by name
    files: Mapping[str, FileRecord]  # bytes and sha256 of every file but state.json, by name
    is_checked: bool = False  # whether the hashes were compared


class CorruptCheckpointError(UserError):
    """A checkpoint is not what was written; `path` is the corrupt file in it."""

    HINT = "move the corrupt checkpoint away and use another, or start afresh with another --tag"

    def __init__(self, path: Path, got: str, expected: str | None = None):
        super().__init__(f"corrupt checkpoint: {path}", got=got, expected=expected, hint=self.HINT)
        self.path = path
        self._arguments = path, got, expected

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments  # ranks tell each other, by pickle


def save(
    folder: Path,
    state: RunState,
    tensors: Mapping[str, Fragments],
    info: Mapping[str, Any],
    world: World,
    *,
    check_lock: Callable[[], None] = lambda: None,
) -> Path:
    """Write `folder/step_N` by all ranks together, and return it once it is complete and on disk.

    `check_lock` raises a UserError where the folder has become another's; then nothing there is touched any more.
    Errors, on all ranks alike: UserError that names the file which cannot be written or does not read back the same.
    """
    final = folder / f"step_{state.step:08d}"
    part = final.with_name(final.name + ".tmp")
    fragments = {f"{kind}.{name}": part for kind, parts in tensors.items() for name, part in parts.items()}

    def begin() -> None:
        check_lock()
        prepare(folder)

    def clear() -> None:
        with suppress(OSError):  # of the lock's file, where the whole disk is gone
            check_lock()  # whoever takes a run over clears what this one writes: then that is the reason
            shutil.rmtree(part, ignore_errors=True)  # on a full disk others want the room

    world.on_rank0(begin)
    try:
        with _naming(part):
            written = write_fragments(part, fragments, world.host_group)
        _together(world, lambda: _read_back(part, written))
        files_of_ranks = world.gather(written)
        shapes_of_ranks = world.gather({name: list(fragment.shape) for name, fragment in fragments.items()})
        content = {
            "format": FORMAT,
            "state": asdict(state),
            **info,
            "shapes": {name: shape for shapes in shapes_of_ranks for name, shape in shapes.items()},
            "files": {name: record for files in files_of_ranks for name, record in files.items()},
        }
        world.on_rank0(lambda: _complete(part, final, content, check_lock))
    except UserError:
        world.on_rank0(clear)
        raise
    return final


def restate(path: Path, state: RunState) -> None:
    """Replace what a complete checkpoint says of the run beside its tensors. Called by one rank. Errors: UserError."""
    with _naming(path):
        content = {**json.loads((path / STATE_FILE).read_bytes()), "state": asdict(state)}
        del content["sha256"]
        part = path / f"{STATE_FILE}.tmp"
        _write_state(part, content)
        os.rename(part, path / STATE_FILE)
        sync(path)


def prune(folder: Path, *, keep: int, best_step: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one. Called by one rank. Errors: UserError."""
    with _naming(folder):
        for path in list_checkpoints(folder)[:-keep]:
            if step_of(path) != best_step:
                # Renamed first: a deletion that is cut off must not leave half a checkpoint under a complete name.
                doomed = path.with_name(path.name + ".tmp")
                path.rename(doomed)
                _delete(doomed)


def prepare(folder: Path) -> None:
    """Make the folder of checkpoints, see that it can be written, and delete what killed saves and deletions left.

    Called by one rank, which holds the run's lock. Errors: UserError.
    """
    with _naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "written.tmp").mkdir(exist_ok=True)
        for stale in folder.glob("*.tmp"):
            if re.fullmatch(r"step_\d+|written", stale.stem):  # an export of a checkpoint is made here too
                _delete(stale)


def _delete(folder: Path) -> None:
    """Delete what no one needs, as far as the file system lets: NFS keeps files that somebody reads."""
    shutil.rmtree(folder, ignore_errors=True)  # what is left is tried again before the next save


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder of checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)), key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder of checkpoints, or None."""
    return next(reversed(list_checkpoints(folder)), None)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read `state.json` and check that all files have their sizes. Errors: UserError naming the file."""
    hint = "use another checkpoint, or start afresh with another --tag"
    try:
        content = json.loads((path / STATE_FILE).read_bytes())
        if content["format"] != FORMAT:
            raise UserError(f"{path} has another format", got=content["format"], expected=FORMAT, hint=hint)
        if content.pop("sha256") != _digest(content):
            raise CorruptCheckpointError(path / STATE_FILE, got="another SHA-256 than it says of itself")
        state = content.pop("state")
        state = RunState(**state | {"counters": Counters(**state.get("counters", {}))})
        shapes = {name: torch.Size(shape) for name, shape in content.pop("shapes").items()}
        files = content.pop("files")
    except FileNotFoundError:
        if path.is_dir() and any(path.iterdir()):
            raise CorruptCheckpointError(path / STATE_FILE, got="no such file") from None
        raise UserError("no checkpoint here", got=path, expected=f"a folder with {STATE_FILE}", hint=hint) from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(path / STATE_FILE, got=repr(error)) from None
    for name, record in files.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != record["bytes"]:
            got = "no such file" if size is None else f"{size} bytes"
            raise CorruptCheckpointError(path / name, got=got, expected=f"{record['bytes']} bytes")
    return Checkpoint(path, state, content, shapes, files)


def check(checkpoint: Checkpoint, world: World) -> Checkpoint:
    """The same checkpoint once its content is found to be what was written; the ranks divide the work.

    Errors, on all ranks alike: UserError naming the corrupt file.
    """
    names = sorted(checkpoint.files)
    _together(world, lambda: _check_files(checkpoint, names[world.rank :: world.size]))
    return replace(checkpoint, is_checked=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The options in which two configs, as plain values, differ: "optim.lr 0.001 -> 0.0005"."""
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

    Errors, on all ranks alike: UserError for a corrupt file, and where the stored tensors of these kinds are not
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
            expected=f"shape {_shape(of_model.get(wrong[0]))} ({len(wrong)} of {len(of_model)} tensors differ)",
            hint="resume with the config of that run, or start afresh with another tag",
        )
    if not checkpoint.is_checked:
        check(checkpoint, world)
    metadata = _together(world, lambda: read_metadata(checkpoint.path, wanted))  # DCP would hide what is raised
    read_fragments(checkpoint.path, wanted, metadata, world.host_group)


def read_tensors(checkpoint: Checkpoint, kind: str) -> dict[str, torch.Tensor]:
    """All tensors of one kind ("model" or "ema"), whole, on the host, by a single process. Errors: as `load`."""
    if not checkpoint.is_checked:
        _check_files(checkpoint, checkpoint.files)
    prefix = f"{kind}."
    shapes = {name: shape for name, shape in checkpoint.shapes.items() if name.startswith(prefix)}
    whole = {name: Fragment(torch.empty(shape.numel()), 0, shape) for name, shape in shapes.items()}
    read_fragments(checkpoint.path, whole, read_metadata(checkpoint.path, whole), None)
    return {name.removeprefix(prefix): part.data.view(part.shape) for name, part in whole.items()}


def _shape(shape: torch.Size | None) -> str:
    return "nothing" if shape is None else str(tuple(shape))


def _check_files(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Errors: UserError for the first of these files whose content is not what was written."""
    for name in names:
        try:
            record = _file_record(checkpoint.path / name)
        except OSError as error:
            raise CorruptCheckpointError(checkpoint.path / name, got=str(error.strerror)) from None
        heartbeat.mark()
        if record != checkpoint.files[name]:
            raise CorruptCheckpointError(checkpoint.path / name, got="another SHA-256 than when it was written")


def _file_record(path: Path) -> FileRecord:
    with open(path, "rb") as file:
        # From the disk, not from the memory that the system keeps of it.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _read_back(folder: Path, written: Mapping[str, FileRecord]) -> None:
    with _naming(folder):
        for name, record in written.items():
            heartbeat.mark()
            if _file_record(folder / name) != record:
                raise UserError(
                    "the disk does not give back what was written to it",
                    got=folder / name,
                    hint="look after the disk, then go on from the checkpoint before with --resume auto",
                )


def _complete(part: Path, final: Path, content: Mapping[str, Any], check_lock: Callable[[], None]) -> None:
    """Write `state.json` as the last file, and give the folder its name."""
    assert not final.exists(), f"{final} is there: a run goes on from its newest checkpoint"
    with _naming(part):
        _write_state(part / STATE_FILE, content)
        sync(part)
        check_lock()
        os.rename(part, final)
        sync(final.parent)


def _write_state(path: Path, content: Mapping[str, Any]) -> None:
    files = HashedFiles()
    with files.create_stream(path, "wb") as stream:
        stream.write(_to_json({**content, "sha256": _digest(content)}))
        stream.flush()
        os.fsync(stream.fileno())
    _read_back(path.parent, files.records)


def _to_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()


def _digest(content: Mapping[str, Any]) -> str:
    """Of what stands in `state.json`, but for this digest itself."""
    return hashlib.sha256(_to_json(content)).hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk. Errors: OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn an error of the system into one that names the file, or this folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            "cannot write the checkpoint",
            got=f"{error.filename or path} ({error.strerror})",
            hint="make room or mend the folder, then go on from the last complete checkpoint with --resume auto",
        ) from None


def _together(world: World, act: Callable[[], T]) -> T:
    """What `act` gives on each rank; the `UserError` of any is raised on all, so that none waits for another."""
    failure = None
    try:
        result = act()
    except UserError as error:
        failure = error
    failed = next((error for error in world.gather(failure) if error is not None), None)
    if failed is not None:
        raise failed
    return result
