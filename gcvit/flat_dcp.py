"""Fragments as ranges of 1-D tensors in a `torch.distributed.checkpoint` (DCP) directory, without trusting a pickle.

DCP's own planners know whole tensors and DTensors; a cut of ZeRO through a matrix is neither. Stored flat, each
fragment is a chunk of a 1-D tensor, and any cut can be read from any other.
"""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
from gcvit.parallel.engine import Fragment

METADATA_FILE = ".metadata"


def write_fragments(folder: Path, fragments: Mapping[str, Fragment], group: dist.ProcessGroup) -> None:
    """Write all ranks' fragments into `folder`, flushed to disk; replicas are divided over their ranks."""
    writer = dcp.FileSystemWriter(folder, sync_files=True)
    dcp.save(dict(fragments), storage_writer=writer, planner=_SavePlanner(), process_group=group)


def read_fragments(folder: Path, fragments: Mapping[str, Fragment], group: dist.ProcessGroup | None) -> None:
    """Fill each fragment in place; `group` None is a single process. Errors: UserError for unusable metadata."""
    metadata = _read_metadata(folder / METADATA_FILE, fragments)  # before the ranks talk: DCP hides what is raised
    reader = _Reader(folder, metadata)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
        dcp.load(
            dict(fragments),
            storage_reader=reader,
            planner=_LoadPlanner(),
            process_group=group,
            no_dist=group is None,
        )


def _read_metadata(path: Path, fragments: Mapping[str, Fragment]) -> Metadata:
    cure = "use another checkpoint"
    try:
        with open(path, "rb") as file:
            metadata = _AllowListUnpickler(file).load()
        stored = {name: metadata.state_dict_metadata[name].size.numel() for name in fragments}
    except Exception as error:  # a damaged pickle makes the unpickler raise nearly anything
        raise UserError(f"cannot read {path}", got=f"{type(error).__name__}: {error}", cure=cure) from None
    wrong = [name for name, part in fragments.items() if stored[name] != part.shape.numel()]
    if wrong:
        raise UserError(f"{path} contradicts the checkpoint's list of shapes", got=wrong[0], cure=cure)
    return metadata


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
    """Reads tensors with `weights_only`, as DCP does, and takes metadata that went through the allow-list."""

    def __init__(self, folder: Path, metadata: Metadata):
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _AllowListUnpickler(pickle.Unpickler):
    """A pickle that can make DCP's own records and nothing else: it can name no other class or function."""

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
