"""Checkpoints of all engines and world sizes: write, read, list, prune. `format.py` says what is on disk.

Stored flat, what a rank holds under any engine is a contiguous range of each tensor: rows under FSDP2, a cut through a
matrix under ZeRO, a whole replica under DDP, which then writes its part of it. So any rank of any engine can read what
it needs from the ranges of any other.

A checkpoint is complete or absent: the ranks write their files to `step_N.tmp`, flush them, and compare what the disk
gives back. `state.json`, with their sizes and hashes and one of itself, comes last; then rank 0 renames the folder, and
only then deletes old ones. So a folder under its final name is complete, whenever a process is killed. What a killed
one leaves is named `.tmp`, which the next run or save removes. `manager.py` does this beside the training.

Sizes and hashes are checked before a tensor is read. Nothing in a checkpoint is executed.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gcvit.checkpoint.format import (
    FORMAT,
    LAST_COMMIT_OF_FORMAT_2,
    STATE_FILE,
    FileRecord,
    Index,
    ReadBackError,
    decode_state,
    encode_header,
    encode_index,
    encode_state,
    find_pieces,
    hash_file,
    rank_file,
    step_dir,
    sync,
    write_file,
)
from gcvit.checkpoint.index import IndexCache
from gcvit.checkpoint.writer_process import WriterError
from gcvit.errors import UserError
from gcvit.optim.adamw import Counters
from gcvit.parallel.engine import Fragment, Fragments
from gcvit.runtime import heartbeat
from gcvit.runtime.distributed import World

T = TypeVar("T")
WriteFile = Callable[[Path, bytes, Sequence[Tensor]], FileRecord]
"""Writes a file of a header and tensors, raises as `format.write_file` does, or `WriterError`."""


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
    index: Index  # shape and ranges of every stored tensor, by name
    files: Mapping[str, FileRecord]  # bytes and sha256 of every file but state.json, by name
    is_checked: bool = False  # whether the hashes were compared

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every stored tensor, by name."""
        return {name: torch.Size(stored["shape"]) for name, stored in self.index.items()}


class CorruptCheckpointError(UserError):
    """A checkpoint is not what was written; `path` is the corrupt file in it."""

    HINT = "move the corrupt checkpoint away and use another, or start afresh with another --tag"

    def __init__(self, path: Path, got: str, expected: str | None = None):
        super().__init__(f"corrupt checkpoint: {path}", got=got, expected=expected, hint=self.HINT)
        self.path = path
        self._arguments = path, got, expected

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments  # ranks tell each other, by pickle


def own_part(fragment: Fragment) -> Fragment:
    """Cut from a replicated fragment the part that this replica writes."""
    per_replica = -(-fragment.data.numel() // fragment.num_replicas)
    offset = min(fragment.replica * per_replica, fragment.data.numel())
    return Fragment(fragment.data[offset : offset + per_replica], fragment.start + offset, fragment.shape)


def write_here(path: Path, header: bytes, tensors: Sequence[Tensor]) -> FileRecord:
    """Write a rank's file in this process. Raises: as `write_file`."""
    pieces = [tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data for tensor in tensors]
    return write_file(path, [memoryview(header), *pieces], heartbeat.mark)


def save(
    folder: Path,
    state: RunState,
    tensors: Mapping[str, Fragments],
    info: Mapping[str, Any],
    world: World,
    *,
    check_lock: Callable[[], None] = lambda: None,
    write: WriteFile = write_here,
    index: IndexCache | None = None,
) -> Path:
    """Write the checkpoint of a step by all ranks together, and return its folder once it is complete and on disk.

    Args:
        folder: The run's folder of checkpoints.
        state: Names the step.
        tensors: What this rank holds, by kind and parameter.
        info: Further members of `state.json`.
        world: All ranks; its host group must be used by nobody else meanwhile.
        check_lock: Raises a UserError where the folder has become another run's; nothing there is touched then.
        write: Writes this rank's file.
        index: The same in each save of a run, so that the index is merged once.

    Raises:
        UserError: On all ranks alike, naming the file that cannot be written or does not read back the same.
        WriterError: On all ranks alike, where the writer of one has failed.
    """
    final = folder / step_dir(state.step)
    part = final.with_name(final.name + ".tmp")
    own = {f"{kind}.{name}": own_part(held) for kind, named in tensors.items() for name, held in named.items()}
    own = {name: held for name, held in own.items() if held.data.numel()}
    header = encode_header({name: held.data.numel() for name, held in own.items()})

    def begin() -> None:
        check_lock()
        prepare(folder)

    def write_own() -> FileRecord:
        with _naming(part):
            part.mkdir(exist_ok=True)
            return write(part / rank_file(world.rank), header, [held.data for held in own.values()])

    def clear() -> None:
        with suppress(OSError):  # of the lock's file, where the whole disk is gone
            check_lock()  # whoever takes a run over clears what this one writes: then that is the reason
            shutil.rmtree(part, ignore_errors=True)  # on a full disk others want the room

    world.on_rank0(begin)
    try:
        records = world.gather(_together(world, write_own))
        encoded_index = (index or IndexCache()).encode(own, world)
        files = {rank_file(rank): record for rank, record in enumerate(records)}
        content = {"format": FORMAT, "state": asdict(state), **info, "files": files}
        world.on_rank0(lambda: _complete(part, final, encode_state(content, encoded_index), check_lock))
    except (UserError, WriterError):
        world.on_rank0(clear)
        raise
    return final


def restate(path: Path, state: RunState) -> None:
    """Replace the run's state in a complete checkpoint, and nothing else. Called by one rank. Raises: UserError."""
    with _naming(path):
        content, _ = decode_state((path / STATE_FILE).read_bytes())
        index = encode_index(content.pop("tensors"))
        part = path / f"{STATE_FILE}.tmp"
        _write_state(part, encode_state({**content, "state": asdict(state)}, index))
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
    """Read `state.json` and check that all files have their sizes. Raises: UserError naming the file."""
    hint = "use another checkpoint, or start afresh with another --tag"
    try:
        content, is_intact = decode_state((path / STATE_FILE).read_bytes())
        if content["format"] != FORMAT and (is_intact or "tensors" not in content):
            raise UserError(
                f"{path} has another format",
                got=content["format"],
                expected=FORMAT,
                hint=f"commit {LAST_COMMIT_OF_FORMAT_2} reads format 2: finish the run with it, or give what its "
                "python -m gcvit.export writes to --init-from",
            )
        if not is_intact:
            raise CorruptCheckpointError(path / STATE_FILE, got="another SHA-256 than it says of itself")
        state = content.pop("state")
        state = RunState(**state | {"counters": Counters(**state.get("counters", {}))})
        index, files = content.pop("tensors"), content.pop("files")
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
    return Checkpoint(path, state, content, index, files)


def check(checkpoint: Checkpoint, world: World) -> Checkpoint:
    """The same checkpoint once its content is found to be what was written; the ranks divide the work.

    Errors, on all ranks alike: UserError naming the corrupt file.
    """
    names = sorted(checkpoint.files)
    _together(world, lambda: _check_files(checkpoint, names[world.rank :: world.size]))
    return replace(checkpoint, is_checked=True)


def has_kind(checkpoint: Checkpoint, kind: str) -> bool:
    """Whether the checkpoint holds tensors of a kind ("model", "exp_avg", "exp_avg_sq", "ema")."""
    return any(name.startswith(f"{kind}.") for name in checkpoint.index)


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
    _together(world, lambda: _read(checkpoint, wanted))


def read_tensors(checkpoint: Checkpoint, kind: str) -> dict[str, Tensor]:
    """Read all tensors of one kind ("model" or "ema"), whole, on the host, by one process. Raises: as `load`."""
    if not checkpoint.is_checked:
        _check_files(checkpoint, checkpoint.files)
    prefix = f"{kind}."
    shapes = {name: shape for name, shape in checkpoint.shapes.items() if name.startswith(prefix)}
    whole = {name: Fragment(torch.empty(shape.numel()), 0, shape) for name, shape in shapes.items()}
    _read(checkpoint, whole)
    return {name.removeprefix(prefix): part.data.view(part.shape) for name, part in whole.items()}


@torch.no_grad()
def _read(checkpoint: Checkpoint, fragments: Mapping[str, Fragment]) -> None:
    """Fill the fragments, file by file, with the ranges that they need. Raises: UserError."""
    path = checkpoint.path
    try:
        pieces: dict[int, list[tuple[str, int, int, Tensor]]] = {}  # by rank: what of its tensors goes where
        for name, part in fragments.items():
            place, stop = 0, part.start + part.data.numel()
            for rank, begin, end in find_pieces(checkpoint.index[name]["ranges"], part.start, stop):
                pieces.setdefault(rank, []).append((name, begin, end, part.data[place : place + end - begin]))
                place += end - begin
        for rank in sorted(pieces):
            path = checkpoint.path / rank_file(rank)
            with safe_open(path, "pt") as file:
                for name, begin, end, target in pieces[rank]:
                    stored = file.get_slice(name)[begin:end]
                    if stored.shape != target.shape or stored.dtype != torch.float32:
                        raise ValueError(f"{name} holds other ranges than the index says")
                    target.copy_(stored)
            heartbeat.mark()
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise UserError(f"cannot read the tensors of {path}", got=got, hint="use another checkpoint") from None


def _shape(shape: torch.Size | None) -> str:
    return "nothing" if shape is None else str(tuple(shape))


def _check_files(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Errors: UserError for the first of these files whose content is not what was written."""
    for name in names:
        try:
            record = hash_file(checkpoint.path / name)
        except OSError as error:
            raise CorruptCheckpointError(checkpoint.path / name, got=str(error.strerror)) from None
        heartbeat.mark()
        if record != checkpoint.files[name]:
            raise CorruptCheckpointError(checkpoint.path / name, got="another SHA-256 than when it was written")


def _complete(part: Path, final: Path, encoded_state: bytes, check_lock: Callable[[], None]) -> None:
    """Write `state.json` as the last file, and give the folder its name."""
    assert not final.exists(), f"{final} is there: a run goes on from its newest checkpoint"
    with _naming(part):
        _write_state(part / STATE_FILE, encoded_state)
        sync(part)
        check_lock()
        os.rename(part, final)
        sync(final.parent)


def _write_state(path: Path, encoded: bytes) -> None:
    write_file(path, [memoryview(encoded)], heartbeat.mark)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn an error of the disk into a UserError that names the file, or this folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            "cannot write the checkpoint",
            got=f"{error.filename or path} ({error.strerror})",
            hint="make room or mend the folder, then go on from the last complete checkpoint with --resume auto",
        ) from None
    except ReadBackError as error:
        raise UserError(
            "the disk does not give back what was written to it",
            got=error.path,
            hint="check the disk, then go on from the checkpoint before with --resume auto",
        ) from None


def _together(world: World, act: Callable[[], T]) -> T:
    """Call `act` on each rank, and raise the error of any rank on all of them, so that none waits for another."""
    failure: UserError | WriterError | None = None
    try:
        result = act()
    except (UserError, WriterError) as error:
        failure = error
    failed = next((error for error in world.gather(failure) if error is not None), None)
    if failed is not None:
        raise failed
    return result
