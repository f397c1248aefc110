"""Save checkpoints beside the training: a snapshot to host memory stops it briefly, then another process writes it.

A thread of the trainer waits for the writer's process (`writer_process.py`), which reads the snapshot from shared
memory. It also waits for the other ranks, over a process group of its own, since messages of two threads on one group
would mix. At most one write is under way. Its failure is raised on all ranks, at the next call.
"""

import logging
import mmap
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gcvit.checkpoint import store
from gcvit.checkpoint.format import FileRecord
from gcvit.checkpoint.index import IndexCache
from gcvit.checkpoint.replica_check import check_replicas
from gcvit.checkpoint.store import RunState, own_part
from gcvit.checkpoint.writer_process import WriterError, WriterProcess
from gcvit.errors import UserError
from gcvit.parallel.engine import Fragment, Fragments
from gcvit.runtime import heartbeat
from gcvit.runtime.distributed import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedSave:
    """Describe a checkpoint that is complete on disk."""

    step: int
    stall_seconds: float
    """Time for which the save stopped the training."""
    write_seconds: float
    """Time of the write beside the training."""
    bytes: int
    """Size of all files; 0 on other ranks than 0."""
    messages: tuple[str, ...] = ()
    """Messages for the user."""


@dataclass
class _Write:
    """Track a write, which is under way until its thread has ended."""

    step: int
    prunes: bool  # older checkpoints
    stall_seconds: float
    num_bytes: int = 0
    seconds: float = 0.0
    failure: UserError | None = None  # the same on all ranks
    bug: str | None = None  # any other error, in words
    messages: tuple[str, ...] = ()


class CheckpointManager:
    """Write and prune the checkpoints of one run in `folder`. Every rank has a manager and makes the same calls.

    Create it in the main thread, and end it with `close`, or with `abandon` after an error. `check_lock` is called on
    rank 0 before files are touched and before a checkpoint gets its name.
    """

    def __init__(self, folder: Path, world: World, *, keep: int, check_lock: Callable[[], None] = lambda: None):
        self._folder, self._world, self._keep = folder, world, keep
        self._check_lock = check_lock
        self._writers = replace(world, host_group=world.new_host_group())
        self._snapshot = Snapshot()
        self._process = WriterProcess(self._snapshot.fd)
        self._index = IndexCache()
        self._thread: threading.Thread | None = None
        self._write: _Write | None = None

    def begin(self, state: RunState, tensors: Mapping[str, Fragments]) -> None:
        """Delete the files that a killed run left, and log the disk space that checkpoints need.

        Raises:
            UserError: The folder cannot be written; raised on all ranks.
        """
        here = sum(own_part(part).data.nbytes for named in tensors.values() for part in named.values())
        num_bytes = sum(self._world.gather(here))

        def clear() -> None:
            store.prepare(self._folder)
            store.prune(self._folder, keep=self._keep, best_step=state.best_step)
            self._log_disk_space(num_bytes)

        self._world.on_rank0(clear)

    def save(
        self, state: RunState, tensors: Mapping[str, Fragments], info: Mapping[str, Any], *, prunes: bool = True
    ) -> list[FinishedSave]:
        """Copy a snapshot and begin to write it, after the write before it has ended. With `prunes`, prune after it.

        Returns:
            The save before, if it was not returned yet.

        Raises:
            UserError: The write before failed, or replicas differ; raised on all ranks, and no write is begun.
            RuntimeError: As in `poll`.
        """
        begin = time.perf_counter()
        must_wait = self._thread is not None and self._thread.is_alive()
        finished = self.wait()
        if must_wait:
            waited = time.perf_counter() - begin
            finished = [
                replace(before, messages=(*before.messages, _describe_wait(waited, before.step))) for before in finished
            ]
        check_replicas(tensors, self._world)
        copied = self._snapshot.copy(tensors)
        write = _Write(state.step, prunes, time.perf_counter() - begin, messages=self._snapshot.pop_messages())
        work = (write, replace(state), copied, dict(info))
        # A daemon: a second Ctrl-C ends the wait for it.
        self._thread = threading.Thread(target=self._run, args=work, name="checkpoint", daemon=True)
        self._write = write
        self._thread.start()
        return finished

    def poll(self) -> list[FinishedSave]:
        """Return the save that has ended on all ranks since the last call, without waiting.

        Raises:
            UserError: The save failed for a reason that a user can change; raised on all ranks.
            RuntimeError: The save failed otherwise; raised on all ranks.
        """
        if not self._thread or not self._write:
            return []
        of_ranks = self._world.gather((not self._thread.is_alive(), self._write.bug))
        _raise_bug(self._write.step, next((bug for _, bug in of_ranks if bug), None))
        return self.wait() if all(has_ended for has_ended, _ in of_ranks) else []

    def wait(self) -> list[FinishedSave]:
        """Wait for the write under way on all ranks and return it.

        Raises:
            UserError, RuntimeError: As in `poll`.
        """
        if not self._thread or not self._write:
            return []
        self._thread.join()
        # Without the other ranks, whose writers may wait for this one's: the launcher ends them.
        _raise_bug(self._write.step, self._write.bug)
        write, self._thread, self._write = self._write, None, None
        failed = next((failure for failure in self._world.gather(write.failure) if failure), None)
        if failed:
            raise failed
        return [FinishedSave(write.step, write.stall_seconds, write.seconds, write.num_bytes, write.messages)]

    def close(self) -> list[FinishedSave]:
        """Wait for the write under way, and end the writer's process.

        Returns:
            The save, if it was not returned yet.

        Raises:
            UserError, RuntimeError: As in `poll`.
        """
        finished = self.wait()
        dist.destroy_process_group(self._writers.host_group)
        self._process.close()
        self._snapshot.close()
        return finished

    def abandon(self) -> list[str]:
        """Wait for the write under way after an error of the training, and end the writer's process.

        The other ranks' main threads may be inside a collective, but their writers still take part.

        Returns:
            A message if the write failed.
        """
        messages = []
        if self._thread and self._write:
            self._thread.join()
            wrong = self._write.failure or self._write.bug
            if wrong:
                messages = [f"besides, the checkpoint of step {self._write.step} failed: {wrong}"]
        self._process.close()
        self._snapshot.close()
        return messages

    def _log_disk_space(self, num_bytes: int) -> None:
        """Log the disk space that checkpoints of `num_bytes` bytes each need."""
        most = self._keep + 2  # the best, and the one that is being written
        there = len(store.list_checkpoints(self._folder))
        free = shutil.disk_usage(self._folder).free
        message = (
            f"checkpoints take {num_bytes / 1e9:.3g} GB each, {self._keep} kept beside the best and the next: up to "
            f"{num_bytes * most / 1e9:.3g} GB, of {free / 1e9:.3g} GB free in {self._folder}"
        )
        if num_bytes * (most - there) <= free:
            logger.info(message)
        else:
            logger.warning(f"{message}: they do not fit; lower trainer.keep_checkpoints, or set output_dir")

    def _run(self, write: _Write, state: RunState, tensors: Mapping[str, Fragments], info: Mapping[str, Any]) -> None:
        begin = time.perf_counter()
        world, write_file = self._writers, self._write_shared if self._snapshot.is_shared else store.write_here
        try:
            path = store.save(
                self._folder,
                state,
                tensors,
                info,
                world,
                check_lock=self._check_lock,
                write=write_file,
                index=self._index,
            )
            heartbeat.mark()
            if write.prunes:
                world.on_rank0(lambda: store.prune(self._folder, keep=self._keep, best_step=state.best_step))
            write.num_bytes = sum(file.stat().st_size for file in path.iterdir()) if world.is_rank0 else 0
        except UserError as error:
            write.failure = error
        except WriterError as error:
            write.bug = str(error)
        except BaseException as error:  # a thread's exception is seen by nobody, and would pass for a success
            write.bug = "".join(traceback.format_exception(error))
        write.seconds = time.perf_counter() - begin

    def _write_shared(self, path: Path, header: bytes, tensors: Sequence[Tensor]) -> FileRecord:
        """Let the writer's process write the snapshot, in whose memory the tensors follow each other."""
        return self._process.write(path, header, sum(tensor.nbytes for tensor in tensors), heartbeat.mark)


def _describe_wait(seconds: float, step: int) -> str:
    return f"training waited {seconds:.1f} s for the checkpoint of step {step} to be written"


def _raise_bug(step: int, bug: str | None) -> None:
    if bug:
        raise RuntimeError(f"the checkpoint of step {step} failed:\n{bug}")


class Snapshot:
    """Hold this rank's part of each fragment, one after the other, in host memory that is allocated once.

    The writer's process shares the memory by the file descriptor `fd`. The memory is no file of /dev/shm, whose size
    containers limit. If the system gives no shared memory, the memory is private, and `is_shared` is false.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("checkpoint")
        self.is_shared = True
        self._memory = torch.empty(0)
        self._messages: list[str] = []

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Fragments]) -> dict[str, Fragments]:
        """Copy the parts that this rank writes; the result is valid until the next call."""
        parts = {kind: {name: own_part(part) for name, part in named.items()} for kind, named in tensors.items()}
        everything = [part.data for named in parts.values() for part in named.values()]
        on_cuda = any(data.is_cuda for data in everything)
        num_elements = sum(data.numel() for data in everything)
        if self._memory.numel() != num_elements:
            self._memory = self._allocate(num_elements, on_cuda)
        copies = iter(self._memory.split([data.numel() for data in everything]))

        def copy(part: Fragment) -> Fragment:
            return replace(part, data=next(copies).copy_(part.data, non_blocking=True))

        copied = {kind: {name: copy(part) for name, part in named.items()} for kind, named in parts.items()}
        if on_cuda:
            torch.cuda.current_stream().synchronize()
        return copied

    def pop_messages(self) -> tuple[str, ...]:
        """Return the messages for the user about the memory, and clear them."""
        messages, self._messages = tuple(self._messages), []
        return messages

    def close(self) -> None:
        """Close the descriptor; the memory is freed with the last copy."""
        os.close(self.fd)

    def _allocate(self, num_elements: int, on_cuda: bool) -> Tensor:
        """Allocate fp32 memory, shared if the system gives it, and pinned if a GPU copies to it."""
        if not num_elements:
            return torch.empty(0)
        try:
            os.ftruncate(self.fd, 0)
            os.posix_fallocate(self.fd, 0, 4 * num_elements)  # else a lack of memory would be a SIGBUS later
            memory = torch.frombuffer(mmap.mmap(self.fd, 4 * num_elements), dtype=torch.float32)
        except OSError as error:
            self.is_shared = False
            self._messages.append(
                f"no {4e-9 * num_elements:.3g} GB of shared memory for checkpoints ({error.strerror}): "
                "the training's process writes them, which slows the steps beside a save"
            )
            return torch.empty(num_elements, pin_memory=on_cuda)
        self.is_shared = True
        if on_cuda:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        return memory
