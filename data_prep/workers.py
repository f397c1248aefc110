"""Run tasks in processes, and show on a terminal how far they are."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import TypeVar

from gcvit.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def default_workers() -> int:
    """Processors that this process may use, which under a batch system are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int
) -> Generator[tuple[int, Result], None, None]:
    """Yield (number of the task, its result) in the order of completion.

    `tasks` may be a generator: it is asked for a task only a little before a worker is free for it. When the
    caller closes it early, running tasks are waited for and the others dropped. Errors: those of `function`;
    UserError for a worker that somebody killed.
    """
    numbered = enumerate(tasks)
    first = list(islice(numbered, 2))
    if num_workers <= 1 or len(first) <= 1:
        for number, task in chain(first, numbered):
            yield number, function(task)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that the caller's threads hold
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
    try:
        numbers: dict[Future[Result], int] = {}
        for number, task in chain(first, numbered):
            numbers[pool.submit(function, task)] = number
            if len(numbers) >= 2 * num_workers:  # twice what can run, so that no worker waits for its next
                yield from _collect(numbers)
        while numbers:
            yield from _collect(numbers)
    except BrokenProcessPool:
        what, hint = (
            "a worker process was killed",
            "if memory ran out, try fewer --workers; start the same command again",
        )
        raise UserError(what, hint=hint) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _collect(numbers: dict[Future[Result], int]) -> Iterator[tuple[int, Result]]:
    """Wait for at least one of the futures; take what is done out of `numbers`."""
    for future in wait(numbers, return_when=FIRST_COMPLETED).done:
        yield numbers.pop(future), future.result()


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        # A pool's workers do not notice that their parent was killed: they would wait for tasks for ever.
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Progress:
    """A line on a terminal's stderr with rate and time left; silent where stderr is a file or a pipe."""

    def __init__(self, title: str, num_samples: int):
        self.title = title
        self.num_samples = num_samples
        self.num_done = 0
        self.num_bytes = 0
        self._start = time.monotonic()
        self._show = sys.stderr.isatty()

    def add(self, num_samples: int, num_bytes: int) -> None:
        self.num_done += num_samples
        self.num_bytes += num_bytes
        if self._show:
            seconds_left = self.seconds * (self.num_samples - self.num_done) / max(1, self.num_done)
            minutes, seconds = divmod(round(seconds_left), 60)
            share = f"{self.num_done:,}/{self.num_samples:,} samples"
            line = f"{self.title}: {share}, {self.rate}, {minutes}:{seconds:02d} left"
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clear the line, so that what follows stands alone."""
        if self._show:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    @property
    def rate(self) -> str:
        megabytes = self.num_bytes / 1e6
        return f"{self.num_done / self.seconds:,.0f} samples/s, {megabytes / self.seconds:,.1f} MB/s"
