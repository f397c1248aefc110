"""The notice that this process must leave: SIGUSR1, SLURM's warning, or SIGTERM, when the machine is taken away.

It only raises a flag here. What follows is agreed among the ranks in `preemption.py`.

SLURM gives USR1 to all processes of a job. One that we start (a compiler, a pool of compilers) would die of it, and
does not where we hold it back, since that is inherited. So it is awaited by a thread; a handler takes it where other
threads, older than that, let it through.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_is_given = False


def heed() -> None:
    """Take the signals for a notice from now on, however often they come. The main thread calls it."""
    for number in SIGNALS:
        signal.signal(number, _note)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    threading.Thread(target=_await, name="notice", daemon=True).start()


def ignore() -> None:
    """Take no notice any more. Python, once it shuts down, would otherwise be killed by these signals."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # only then are those dropped that came meanwhile


def is_given() -> bool:
    return _is_given


@contextmanager
def held_back() -> Iterator[None]:
    """Let no signal through while inside, nor ever to the processes that are started in it, which inherit that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _await() -> None:
    while True:
        _note(signal.sigwait({signal.SIGUSR1}), None)


def _note(number: int, frame: FrameType | None) -> None:
    global _is_given
    _is_given = True
