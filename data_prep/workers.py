"""Run tasks in processes, and show their progress."""

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
from typing import NoReturn, TextIO, TypeVar

from tqdm import tqdm

from gcvit.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

LOG_SECONDS = 30.0  # between the lines of progress in a log file


def default_workers() -> int:
    """Count the processors that this process may use; a batch system may grant fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int
) -> Generator[tuple[int, Result], None, None]:
    """Yield (number of the task, its result) in the order of completion.

    `tasks` may be a generator: a task is drawn from it only shortly before a worker is free. If the caller closes this
    generator early, running tasks are finished and the others dropped.

    Raises:
        UserError: A worker process was killed. Errors of `function` are passed on.
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
    """Wait for at least one of the futures; yield the finished ones and remove them from `numbers`."""
    for future in wait(numbers, return_when=FIRST_COMPLETED).done:
        yield numbers.pop(future), future.result()


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        # A pool's workers do not notice that their parent was killed: they would wait for tasks for ever.
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


class _LogLines:
    """Write each refresh of a progress bar as a line of its own, for a stderr that is a file or a pipe."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


class Progress:
    """Show progress on stderr: a bar on a terminal; a line every `LOG_SECONDS` in a log file, none before these."""

    def __init__(self, title: str, total: int, unit: str = "samples"):
        is_terminal = sys.stderr.isatty()
        self.num_bytes = 0
        self._start = time.monotonic()
        self._bar: tqdm[NoReturn] = tqdm(
            desc=title,
            total=total,
            unit=f" {unit}",
            file=sys.stderr if is_terminal else _LogLines(sys.stderr),
            mininterval=0.1 if is_terminal else LOG_SECONDS,
            delay=0 if is_terminal else LOG_SECONDS,
            miniters=1,  # else tqdm's monitor thread would refresh every 10 s, whatever the interval
            dynamic_ncols=is_terminal,
            leave=False,
        )

    def add(self, count: int, num_bytes: int = 0) -> None:
        """Count finished units, and the bytes in them."""
        self.num_bytes += num_bytes
        if self.num_bytes:
            self._bar.set_postfix_str(f"{self.num_bytes / 1e6 / self.seconds:,.1f} MB/s", refresh=False)
        self._bar.update(count)

    def clear(self) -> None:
        """Clear the bar for other output; the next `add` shows it again."""
        self._bar.clear()

    def close(self) -> None:
        """Remove the bar permanently."""
        self._bar.close()

    @property
    def seconds(self) -> float:
        """Seconds since the start, above 0."""
        return max(time.monotonic() - self._start, 1e-9)

    @property
    def rate(self) -> str:
        """Units and megabytes a second, as text."""
        count = self._bar.n / self.seconds
        return f"{count:,.0f}{self._bar.unit}/s, {self.num_bytes / 1e6 / self.seconds:,.1f} MB/s"
