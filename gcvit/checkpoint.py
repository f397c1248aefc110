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
import pickle
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from gcvit.errors import UserError
from gcvit.parallel.engine import Fragment, Fragments
from gcvit.parallel.world import World

STATE_FILE = "state.json"
FORMAT = 1


@dataclass
class RunState:
    """Everything about a run that changes while it runs, beside its tensors: what is not here does not survive."""

    step: int = 0
    samples: int = 0  # consumed; with the seed, the place in the order
    updates: int = 0  # AdamW's count: steps less the refused ones
    ema_updates: int = 0
    best_top1: float = -1.0  # percent; the EMA's where there is one
    best_step: int = -1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk: its folder and what `state.json` says."""

    path: Path
    state: RunState
    info: Mapping[str, Any]  # config, data digest, engine, world size
    shapes: Mapping[str, torch.Size]  # of every stored tensor, by name


def save(
    folder: Path, state: RunState, tensors: Mapping[str, Fragments], info: Mapping[str, Any], world: World
) -> Path:
    """Write `folder/step_N` by all ranks together, and return it once it is complete and on disk."""
    final = folder / f"step_{state.step:08d}"
    part = final.with_name(final.name + ".tmp")
    if world.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (part, final):
            if stale.exists():
                shutil.rmtree(stale)
    world.barrier()
    fragments = {f"{kind}.{name}": part for kind, parts in tensors.items() for name, part in parts.items()}
    writer = dcp.FileSystemWriter(part, sync_files=True)
    dcp.save(fragments, storage_writer=writer, planner=_SavePlanner(), process_group=world.host_group)
    files = {path.name: _file_record(path) for path in part.glob(f"__{world.rank}_*")}
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
        state = RunState(**content.pop("state"))
        shapes = {name: torch.Size(shape) for name, shape in content.pop("shapes").items()}
        files = content.pop("files")
    except FileNotFoundError:
        raise UserError("no checkpoint here", got=path, allowed=f"a folder with {STATE_FILE}", cure=cure) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path / STATE_FILE}", got=repr(error), cure=cure) from None
    for name, record in files.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != record["bytes"]:
            got = "no such file" if size is None else f"{size} bytes"
            raise UserError(
                f"damaged checkpoint: {path / name}", got=got, allowed=f"{record['bytes']} bytes", cure=cure
            )
    return Checkpoint(path, state, content, shapes)


def has_kind(checkpoint: Checkpoint, kind: str) -> bool:
    """Whether the checkpoint holds tensors of a kind ("model", "exp_avg", "exp_avg_sq", "ema")."""
    return any(name.startswith(f"{kind}.") for name in checkpoint.shapes)


def load(checkpoint: Checkpoint, tensors: Mapping[str, Fragments], world: World) -> None:
    """Fill the fragments from a checkpoint that any engine at any world size wrote.

    Errors: UserError where a tensor is missing or has another shape: it is a checkpoint of another model.
    """
    wanted = {f"{kind}.{name}": part for kind, parts in tensors.items() for name, part in parts.items()}
    wrong = [name for name, part in wanted.items() if checkpoint.shapes.get(name) != part.shape]
    if wrong:
        stored = checkpoint.shapes.get(wrong[0])
        raise UserError(
            f"{checkpoint.path} is a checkpoint of another model",
            got=f"{wrong[0]} of shape {tuple(stored) if stored is not None else 'nothing'}",
            allowed=f"shape {tuple(wanted[wrong[0]].shape)} ({len(wrong)} of {len(wanted)} tensors differ)",
            cure="resume with the config of that run, or start afresh with another tag",
        )
    dcp.load(
        wanted,
        storage_reader=_Reader(checkpoint.path),
        planner=_LoadPlanner(),
        process_group=world.host_group,
    )


def read_tensors(checkpoint: Checkpoint, kind: str) -> dict[str, torch.Tensor]:
    """All tensors of one kind ("model" or "ema"), whole, on the host, by a single process."""
    prefix = f"{kind}."
    shapes = {name: shape for name, shape in checkpoint.shapes.items() if name.startswith(prefix)}
    whole = {name: Fragment(torch.empty(shape.numel()), 0, shape) for name, shape in shapes.items()}
    dcp.load(whole, storage_reader=_Reader(checkpoint.path), planner=_LoadPlanner(), no_dist=True)
    return {name.removeprefix(prefix): part.data.view(part.shape) for name, part in whole.items()}


class _SavePlanner(SavePlanner):
    """Writes each fragment as a range of a 1-D tensor; replicas are divided, so that all ranks write alike."""

    def set_up_planner(
        self, state_dict: dict[str, Fragment], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        self._parts = {name: _own_part(fragment) for name, fragment in state_dict.items()}

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(name, part) for name, part in self._parts.items() if part.data.numel()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._parts[write_item.index.fqn].data


class _LoadPlanner(LoadPlanner):
    """Reads the ranges that this rank holds, from whatever ranges were written."""

    def set_up_planner(
        self, state_dict: dict[str, Fragment], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self._parts, self._metadata = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for name, part in self._parts.items():
            stored = self._metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, [_chunk(part)])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("a checkpoint holds tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        data = self._parts[read_item.dest_index.fqn].data
        return data.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: the range was filled in place."""


def _own_part(fragment: Fragment) -> Fragment:
    """The part of a replicated fragment that this replica writes."""
    per_replica = -(-fragment.data.numel() // fragment.num_replicas)
    offset = min(fragment.replica * per_replica, fragment.data.numel())
    return Fragment(fragment.data[offset : offset + per_replica], fragment.start + offset, fragment.shape)


def _chunk(part: Fragment) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([part.start]), torch.Size([part.data.numel()]))


def _write_item(name: str, part: Fragment) -> WriteItem:
    size = torch.Size([part.shape.numel()])
    data = TensorWriteData(_chunk(part), TensorProperties.create_from_tensor(part.data), size)
    return WriteItem(MetadataIndex(name, torch.Size([part.start])), WriteItemType.SHARD, tensor_data=data)


class _Reader(dcp.FileSystemReader):
    """Reads DCP's metadata, a pickle, through an allow-list: a file can name no other class or function."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                return _AllowListUnpickler(file).load()
        except (OSError, pickle.UnpicklingError, EOFError) as error:
            raise UserError(f"cannot read {path}", got=str(error), cure="use another checkpoint") from None


class _AllowListUnpickler(pickle.Unpickler):
    ALLOWED = frozenset(
        [("torch.distributed.checkpoint.metadata", name) for name in (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "StorageMeta", "_MEM_FORMAT_ENCODING")]
        + [("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout")]
        + [("torch", "Size"), ("torch", "float32"), ("pathlib", "PosixPath"), ("pathlib", "Path")]
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint's metadata")
        return super().find_class(module, name)


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
