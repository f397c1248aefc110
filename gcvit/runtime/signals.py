"""The preemption signals of this process: SIGUSR1, which SLURM sends ahead, and SIGTERM, which precedes a kill.

A signal only sets a flag here. `preemption.py` has all ranks agree on the step at which they stop.

SLURM sends SIGUSR1 to all processes of a job. It would kill a process that the training starts, a compiler for example.
A blocked signal does not, and child processes inherit the block. So the main thread blocks SIGUSR1, and a thread waits
for it. The handler serves the threads that started before the block, which receive the signal all the same.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_is_received = False


def install_handlers() -> None:
    """Have the signals set the flag from now on, however often they come. Call it in the main thread."""
    for number in SIGNALS:
        signal.signal(number, _set_flag)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    threading.Thread(target=_await, name="preemption signal", daemon=True).start()


def ignore_signals() -> None:
    """Ignore the signals from now on: they would kill Python while it shuts down."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # last, so that pending ones are ignored


def is_received() -> bool:
    """Return whether this process has received a preemption signal."""
    return _is_received


@contextmanager
def block_signals() -> Iterator[None]:
    """Block the signals while the block runs. Processes that are started in it inherit the block for good."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _await() -> None:
    while True:
        _set_flag(signal.sigwait({signal.SIGUSR1}), None)


def _set_flag(number: int, frame: FrameType | None) -> None:
    global _is_received
    _is_received = True
