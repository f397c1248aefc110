"""Write, read, list and prune checkpoints of all engines and world sizes. `format.py` defines the files.

Under any engine a rank holds a contiguous range of each flattened tensor: rows under FSDP2, a cut through a matrix
under ZeRO, a whole replica under DDP, of which it writes a part. So any rank of any engine can read what it needs.

A checkpoint is complete or absent. The ranks write their files to `step_N.tmp`, flush them and read them back. Then
rank 0 writes `state.json` with all sizes and hashes, renames the folder, and only then deletes old ones. The next save
deletes the `.tmp` folder of a killed one. Hashes are checked before a tensor is read. Nothing is executed.
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
"""Writes a file of a header and tensors; raises as `format.write_file` does, or a `WriterError`."""


@dataclass
class RunState:
    """Hold everything about a run that changes while it runs, beside its tensors; nothing else survives a restart."""

    step: int = 0
    samples: int = 0  # consumed; with the seed, the place in the order
    counters: Counters = field(default_factory=Counters)
    ema_updates: int = 0
    best_top1: float = -1.0  # percent; the EMA's if there is one
    best_step: int = -1
    evaluation_due: bool = False  # of this step: the run was preempted before or during it
    initial_weights: str | None = None  # their origin by --init-from, in words; None: drawn from the seed


@dataclass(frozen=True)
class Checkpoint:
    """Describe a complete checkpoint on disk: its folder and the content of `state.json`."""

    path: Path
    state: RunState
    info: Mapping[str, Any]  # "config" as plain values, "data" (its digest), "world_size", "classes"
    index: Index  # shape and ranges of every stored tensor, by name
    files: Mapping[str, FileRecord]  # bytes and sha256 of every file but state.json, by name
    is_checked: bool = False  # whether the hashes were compared

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of every stored tensor, by name."""
        return {name: torch.Size(stored["shape"]) for name, stored in self.index.items()}


class CorruptCheckpointError(UserError):
    """Report a checkpoint that is not as it was written; `path` is the corrupt file in it."""

    HINT = "move the corrupt checkpoint away and use another, or start afresh with another --tag"

    def __init__(self, path: Path, got: str, expected: str | None = None):
        super().__init__(f"corrupt checkpoint: {path}", got=got, expected=expected, hint=self.HINT)
        self.path = path
        self._arguments = path, got, expected

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments  # ranks send it to each other by pickle


def own_part(fragment: Fragment) -> Fragment:
    """Cut from a replicated fragment the part that this replica writes."""
    per_replica = -(-fragment.data.numel() // fragment.num_replicas)
    offset = min(fragment.replica * per_replica, fragment.data.numel())
    return Fragment(fragment.data[offset : offset + per_replica], fragment.start + offset, fragment.shape)


def write_here(path: Path, header: bytes, tensors: Sequence[Tensor]) -> FileRecord:
    """Write a rank's file in this process; raises as `write_file` does."""
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
        tensors: The fragments of this rank, by kind and parameter.
        world: All ranks; its host group must be used by nobody else meanwhile.
        check_lock: Raises a UserError if the folder has become another run's, of which no file is touched then.
        index: The same cache in each save of a run, so that the index is merged once.

    Raises:
        UserError: A file cannot be written or reads back differently; raised on all ranks, with the file's name.
        WriterError: The writer of a rank has failed; raised on all ranks.
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
        with suppress(OSError):  # of the lock's file, if the whole disk is gone
            check_lock()  # a process that takes the run over deletes this folder: then that is the reason
            shutil.rmtree(part, ignore_errors=True)  # other users of a full disk need the room

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
    """Replace the run's state in a complete checkpoint, by one rank; raises a UserError if the disk refuses it."""
    with _naming(path):
        content, _ = decode_state((path / STATE_FILE).read_bytes())
        index = encode_index(content.pop("tensors"))
        part = path / f"{STATE_FILE}.tmp"
        _write_state(part, encode_state({**content, "state": asdict(state)}, index))
        os.rename(part, path / STATE_FILE)
        sync(path)


def prune(folder: Path, *, keep: int, best_step: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one. Called by one rank.

    Raises:
        UserError: The folder cannot be written.
    """
    with _naming(folder):
        for path in list_checkpoints(folder)[:-keep]:
            if step_of(path) != best_step:
                doomed = path.with_name(path.name + ".tmp")
                path.rename(doomed)  # first, so that a deletion that is cut off leaves no half under a complete name
                _delete(doomed)


def prepare(folder: Path) -> None:
    """Make the folder of checkpoints, check that it is writable, and delete the `.tmp` folders of killed saves.

    Raises:
        UserError: The folder cannot be written.
    """
    with _naming(folder):  # called by one rank, which holds the run's lock
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "written.tmp").mkdir(exist_ok=True)
        for stale in folder.glob("*.tmp"):
            if re.fullmatch(r"step_\d+|written", stale.stem):  # an export of a checkpoint is made here too
                _delete(stale)


def _delete(folder: Path) -> None:
    """Delete a folder that no one needs, as far as the file system lets: NFS keeps files that somebody reads."""
    shutil.rmtree(folder, ignore_errors=True)  # the next save deletes the rest


def list_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints in a folder of checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)), key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in a folder of checkpoints, or None."""
    return next(reversed(list_checkpoints(folder)), None)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read `state.json` and check that all files have their sizes.

    Raises:
        UserError: The checkpoint is absent, has another format or is corrupt; the error names the file.
    """
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
    """Check the hashes of all files, which the ranks divide, and return the checkpoint marked as checked.

    Raises:
        CorruptCheckpointError: A file differs or cannot be read; raised on all ranks.
    """
    names = sorted(checkpoint.files)
    _together(world, lambda: _check_files(checkpoint, names[world.rank :: world.size]))
    return replace(checkpoint, is_checked=True)


def has_kind(checkpoint: Checkpoint, kind: str) -> bool:
    """Return whether the checkpoint holds tensors of a kind ("model", "exp_avg", "exp_avg_sq", "ema")."""
    return any(name.startswith(f"{kind}.") for name in checkpoint.index)


def load(checkpoint: Checkpoint, tensors: Mapping[str, Fragments], world: World) -> None:
    """Fill the fragments from a checkpoint that any engine at any world size wrote; by all ranks together.

    Raises:
        UserError: A file is corrupt, or the stored tensors of these kinds are not the model's; raised on all ranks.
    """
    wanted = {f"{kind}.{name}": part for kind, parts in tensors.items() for name, part in parts.items()}
    of_ranks = world.gather({name: part.shape for name, part in wanted.items()})  # one may lack a small tensor
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
    """Read all tensors of one kind ("model" or "ema") to the host, whole, by one process; raises as `load` does."""
    if not checkpoint.is_checked:
        _check_files(checkpoint, checkpoint.files)
    prefix = f"{kind}."
    shapes = {name: shape for name, shape in checkpoint.shapes.items() if name.startswith(prefix)}
    whole = {name: Fragment(torch.empty(shape.numel()), 0, shape) for name, shape in shapes.items()}
    _read(checkpoint, whole)
    return {name.removeprefix(prefix): part.data.view(part.shape) for name, part in whole.items()}


@torch.no_grad()
def _read(checkpoint: Checkpoint, fragments: Mapping[str, Fragment]) -> None:
    """Fill the fragments, file by file, with the ranges that they need; raise a UserError if one cannot be read."""
    path = checkpoint.path
    try:
        pieces: dict[int, list[tuple[str, int, int, Tensor]]] = {}  # by rank: tensor, its range, its destination
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
    """Check the hashes of these files; raise a CorruptCheckpointError for the first that differs or cannot be read."""
    for name in names:
        try:
            record = hash_file(checkpoint.path / name)
        except OSError as error:
            raise CorruptCheckpointError(checkpoint.path / name, got=str(error.strerror)) from None
        heartbeat.mark()
        if record != checkpoint.files[name]:
            raise CorruptCheckpointError(checkpoint.path / name, got="another SHA-256 than when it was written")


def _complete(part: Path, final: Path, encoded_state: bytes, check_lock: Callable[[], None]) -> None:
    """Write `state.json` as the last file, and rename the folder to its final name."""
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
    """Convert an error of the disk to a UserError that names the file, or this folder."""
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
