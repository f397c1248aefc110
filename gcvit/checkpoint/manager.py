"""Checkpoints beside the training: a snapshot to host memory, which stops it shortly, and a thread that writes it.

The thread talks to those of the other ranks over a group of its own: messages of two threads on one group would mix.
One write is under way at most. What goes wrong in it is told on all ranks alike, at the next look at it.
"""

import shutil
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from gcvit.checkpoint import store
from gcvit.checkpoint.replica_check import check_replicas
from gcvit.checkpoint.shard_files import own_part
from gcvit.checkpoint.store import RunState
from gcvit.errors import UserError
from gcvit.monitoring.metric_logger import Metrics
from gcvit.parallel.engine import Fragment, Fragments
from gcvit.runtime import heartbeat
from gcvit.runtime.distributed import World


@dataclass
class _Write:
    """A write under way, or done when its thread has ended."""

    step: int
    prunes: bool  # the ones before it
    stall_seconds: float  # for which it stopped the training
    num_bytes: int = 0
    seconds: float = 0.0
    failure: UserError | None = None  # the same on all ranks
    bug: str | None = None  # the traceback of any other error


class Saver:
    """Writes and prunes the checkpoints of one run in `folder`. Every rank has one and makes the same calls.

    `check_lock` is asked on rank 0 before files are touched and before a checkpoint gets its name. A context manager:
    leaving it waits for the write under way.
    """

    def __init__(
        self, folder: Path, world: World, metrics: Metrics, *, keep: int, check_lock: Callable[[], None] = lambda: None
    ):
        self._folder, self._world, self._metrics, self._keep = folder, world, metrics, keep
        self._check_lock = check_lock
        self._writers = replace(world, host_group=world.new_host_group())
        self._snapshot = _Snapshot()
        self._thread: threading.Thread | None = None
        self._write: _Write | None = None

    def begin(self, state: RunState, tensors: Mapping[str, Fragments]) -> str:
        """Clear what a killed run left, and say what disk the checkpoints of these tensors take.

        Errors, on all ranks alike: UserError where the folder cannot be written.
        """
        here = sum(own_part(part).data.nbytes for named in tensors.values() for part in named.values())
        num_bytes = sum(self._world.gather(here))

        def clear() -> str:
            store.prepare(self._folder)
            store.prune(self._folder, keep=self._keep, best_step=state.best_step)
            return self._describe_disk(num_bytes)

        return self._world.on_rank0(clear)

    def save(
        self, state: RunState, tensors: Mapping[str, Fragments], info: Mapping[str, Any], *, prunes: bool = True
    ) -> None:
        """Take a snapshot and begin to write it, once the write before it has ended; then prune, if it `prunes`.

        Errors, on all ranks alike: UserError where that write failed or replicas differ; then nothing is begun.
        """
        begin = time.perf_counter()
        if self._write and self._thread:
            before, must_wait = self._write.step, self._thread.is_alive()
            self.wait()
            if must_wait:
                waited = time.perf_counter() - begin
                self._metrics.say(f"training waited {waited:.1f} s for the checkpoint of step {before} to be written")
        check_replicas(tensors, self._world)
        taken = self._snapshot.take(tensors)
        write = _Write(state.step, prunes, time.perf_counter() - begin)
        work = (write, replace(state), taken, dict(info))
        # A daemon: a second Ctrl-C ends the wait for it.
        self._thread = threading.Thread(target=self._run, args=work, name="checkpoint", daemon=True)
        self._write = write
        self._thread.start()

    def poll(self) -> None:
        """Log the write that has ended on all ranks. Errors, on all ranks alike: UserError where it failed."""
        self._stop_at_a_bug()
        if self._thread and all(self._world.gather(not self._thread.is_alive())):
            self.wait()

    def wait(self) -> None:
        """Wait for the write under way on all ranks and log it. Errors: as `poll`."""
        if self._thread and self._write:
            self._thread.join()
            self._stop_at_a_bug()
            write, self._thread, self._write = self._write, None, None
            failed = next((failure for failure in self._world.gather(write.failure) if failure), None)
            if failed:
                raise failed
            row = {"stall_seconds": write.stall_seconds, "write_seconds": write.seconds, "bytes": write.num_bytes}
            self._metrics.log_checkpoint(write.step, row)

    def _stop_at_a_bug(self) -> None:
        """Without a word to the other ranks, whose writers may wait for this one's: the launcher ends them."""
        if self._write and self._write.bug:
            raise RuntimeError(f"the checkpoint of step {self._write.step} failed:\n{self._write.bug}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, place: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
            dist.destroy_process_group(self._writers.host_group)
        elif self._thread and self._write:
            # The other ranks' main threads may be inside a collective, but their writers still take part.
            self._thread.join()
            wrong = self._write.failure or self._write.bug
            if wrong:
                self._metrics.say(f"besides, the checkpoint of step {self._write.step} failed: {wrong}")

    def _describe_disk(self, num_bytes: int) -> str:
        """In words, for checkpoints of so many bytes each."""
        most = self._keep + 2  # the best, and the one that is being written
        there = len(store.list_checkpoints(self._folder))
        free = shutil.disk_usage(self._folder).free
        fits = num_bytes * (most - there) <= free
        return (
            f"checkpoints take {num_bytes / 1e9:.3g} GB each, {self._keep} kept beside the best and the next: up to "
            f"{num_bytes * most / 1e9:.3g} GB, of {free / 1e9:.3g} GB free in {self._folder}"
            + ("" if fits else ": WARNING, THEY DO NOT FIT; lower trainer.keep_checkpoints, or set output_dir")
        )

    def _run(self, write: _Write, state: RunState, tensors: Mapping[str, Fragments], info: Mapping[str, Any]) -> None:
        begin = time.perf_counter()
        world = self._writers
        try:
            path = store.save(self._folder, state, tensors, info, world, check_lock=self._check_lock)
            heartbeat.mark()
            if write.prunes:
                world.on_rank0(lambda: store.prune(self._folder, keep=self._keep, best_step=state.best_step))
            write.num_bytes = sum(file.stat().st_size for file in path.iterdir()) if world.is_rank0 else 0
        except UserError as error:
            write.failure = error
        except BaseException as error:  # as DCP's CheckpointException is; unseen it would pass for a success
            write.bug = "".join(traceback.format_exception(error))
        write.seconds = time.perf_counter() - begin


class _Snapshot:
    """This rank's part of each fragment in host memory, which is taken once and used again."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Fragments]) -> dict[str, Fragments]:
        """Copy the parts that this rank writes; the result holds until the next call."""
        parts = {kind: {name: own_part(part) for name, part in named.items()} for kind, named in tensors.items()}
        everything = [part.data for named in parts.values() for part in named.values()]
        on_cuda = any(data.is_cuda for data in everything)
        num_elements = sum(data.numel() for data in everything)
        if self._memory.numel() != num_elements:
            self._memory = torch.empty(num_elements, pin_memory=on_cuda)
        copies = iter(self._memory.split([data.numel() for data in everything]))

        def copy(part: Fragment) -> Fragment:
            return replace(part, data=next(copies).copy_(part.data, non_blocking=True))

        taken = {kind: {name: copy(part) for name, part in named.items()} for kind, named in parts.items()}
        if on_cuda:
            torch.cuda.current_stream().synchronize()
        return taken
