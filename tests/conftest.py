"""Settings for all tests; what several test files need lies beside them, not here."""

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from gcvit.runtime import signals

# Before torch is imported: one thread per process, so that sums keep their order and processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples on every run and no clock: what failed fails again, and a loaded machine fails nothing.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """A training in the tests' own process takes SIGTERM for a notice; whoever wants to end the tests does not."""
    handlers = {number: signal.getsignal(number) for number in signals.SIGNALS}
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
    for number, handler in handlers.items():
        signal.signal(number, handler)
