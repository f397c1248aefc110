"""The notice that this process must leave: SIGUSR1, SLURM's warning, or SIGTERM, when the machine is taken away.

It only raises a flag here. What follows is agreed among the ranks in `preemption.py`.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_is_given = False


def heed() -> None:
    """Take the signals for a notice from now on, however often they come. The main thread calls it."""
    for number in SIGNALS:
        signal.signal(number, _note)


def ignore() -> None:
    """Take no notice any more. Python, once it shuts down, would otherwise be killed by these signals."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


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


def _note(number: int, frame: FrameType | None) -> None:
    global _is_given
    _is_given = True
