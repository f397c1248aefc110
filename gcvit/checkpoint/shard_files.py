"""Fragments as ranges of 1-D tensors in a `torch.distributed.checkpoint` (DCP) directory, without trusting a pickle.

DCP's own planners know whole tensors and DTensors; a cut of ZeRO through a matrix is neither. Stored flat, each
fragment is a chunk of a 1-D tensor, and any cut can be read from any other.
"""

import hashlib
import io
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem
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
from gcvit.runtime import heartbeat

METADATA_FILE = ".metadata"

FileRecord = dict[str, Any]  # "bytes" and "sha256" of a file


def write_fragments(folder: Path, fragments: Mapping[str, Fragment], group: dist.ProcessGroup) -> dict[str, FileRecord]:
    """Write all ranks' fragments into `folder`, flushed to disk; replicas are divided over their ranks.

    Returns what this rank handed to the disk, by file name. Errors: OSError with the file's name, on all ranks alike.
    """
    # Without copying ahead DCP asks no accelerator anything: the fragments may be written by a thread beside training.
    writer = dcp.FileSystemWriter(folder, sync_files=True, per_thread_copy_ahead=0)
    writer.fs = files = HashedFiles()
    try:
        # The planner holds the fragments: DCP's log of each entry of a state dict would cost more than planning it.
        dcp.save({}, storage_writer=writer, planner=_SavePlanner(fragments), process_group=group)
    except CheckpointException as error:
        for _, (failure, _) in sorted(error.failures.items()):
            if isinstance(failure, OSError):
                raise failure from None
        raise
    return files.records


def own_part(fragment: Fragment) -> Fragment:
    """The part of a replicated fragment that this replica writes."""
    per_replica = -(-fragment.data.numel() // fragment.num_replicas)
    offset = min(fragment.replica * per_replica, fragment.data.numel())
    return Fragment(fragment.data[offset : offset + per_replica], fragment.start + offset, fragment.shape)


def read_fragments(
    folder: Path, fragments: Mapping[str, Fragment], metadata: Metadata, group: dist.ProcessGroup | None
) -> None:
    """Fill each fragment in place, by `read_metadata` of the same ones; `group` None is a single process.

    Errors, on all ranks alike: UserError for what cannot be read.
    """
    reader = _Reader(folder, metadata)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
        try:
            dcp.load(
                {},
                storage_reader=reader,
                planner=_LoadPlanner(fragments, metadata),
                process_group=group,
                no_dist=group is None,
            )
        except CheckpointException as error:
            _, (failure, _) = min(error.failures.items())
            got = f"{type(failure).__name__}: {failure}"
            raise UserError(f"cannot read the tensors of {folder}", got=got, hint="use another checkpoint") from None


def read_metadata(folder: Path, fragments: Mapping[str, Fragment]) -> Metadata:
    """Where the fragments' tensors lie. Errors, on this rank: UserError where that cannot be read safely."""
    path, hint = folder / METADATA_FILE, "use another checkpoint"
    try:
        with open(path, "rb") as file:
            metadata = _AllowListUnpickler(file).load()
        stored = {name: metadata.state_dict_metadata[name].size.numel() for name in fragments}
    except Exception as error:  # a corrupt pickle makes the unpickler raise nearly anything
        raise UserError(f"cannot read {path}", got=f"{type(error).__name__}: {error}", hint=hint) from None
    wrong = [name for name, part in fragments.items() if stored[name] != part.shape.numel()]
    if wrong:
        raise UserError(f"{path} contradicts the checkpoint's list of shapes", got=wrong[0], hint=hint)
    return metadata


class HashedFiles(FileSystem):
    """Hashes what it writes on its way to the disk, and adds the file's name to any error."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}  # by file name

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb", mode
        raw = None
        try:
            with _HashedFile(path) as raw, io.BufferedWriter(raw, 1 << 20) as stream:
                yield stream
        except Exception as error:
            failure = raw.failure if raw and raw.failure else error  # torch.save tells of its own consequences
            if not isinstance(failure, OSError):
                raise
            raise OSError(failure.errno, failure.strerror, str(path)) from None
        self.records[Path(path).name] = {"bytes": raw.num_bytes, "sha256": raw.sha256.hexdigest()}

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _HashedFile(io.FileIO):
    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path, "wb")
        self.sha256, self.num_bytes = hashlib.sha256(), 0
        self.failure: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            num_bytes = super().write(content)
        except OSError as error:
            self.failure = error
            raise
        assert num_bytes is not None  # it is no pipe
        self.sha256.update(memoryview(content)[:num_bytes])
        self.num_bytes += num_bytes
        heartbeat.mark()
        return num_bytes


class _SavePlanner(SavePlanner):
    """Writes each fragment as a range of a 1-D tensor; replicas are divided, so that all ranks write alike."""

    def __init__(self, fragments: Mapping[str, Fragment]):
        self._parts = {name: own_part(fragment) for name, fragment in fragments.items()}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """Nothing to do: the fragments are known."""

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

    def __init__(self, fragments: Mapping[str, Fragment], metadata: Metadata):
        self._parts, self._metadata = fragments, metadata

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing to do: the fragments and the metadata are known."""

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
