"""Settings for all tests, and the device that they compute on."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from gcvit.runtime import signals

if TYPE_CHECKING:
    import torch

# Before torch is imported: one thread per process, so that sums keep their order and processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples on every run and no clock: what failed fails again, and a loaded machine fails nothing.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("repeatable")

# Files of minutes, the longest first. Each file runs in one process: one that begins last would run alone at the end,
# with the other core idle. `make test-integration` and `make test-slow` print the durations.
LONG_FILES = (
    "integration/test_kills.py",
    "parity/test_window_kernels.py",
    "integration/test_preemption.py",
    "integration/test_stalls.py",
    "integration/test_golden.py",
    "integration/test_matrix.py",
    "integration/test_train_cli.py",
    "integration/test_readme.py",
    "integration/test_docs.py",
    "integration/test_compile.py",
    "integration/test_live.py",
    "integration/test_replay.py",
    "integration/test_nonfinite.py",
    "integration/test_fsdp.py",
    "integration/test_zero.py",
    "unit/parallel/test_engines.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files of `LONG_FILES` first, in its order; the order within a file stays."""
    folder = Path(__file__).parent
    place = {folder / name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(autouse=True)
def restored_signals() -> Iterator[None]:
    """Restore the signal handlers: a training in the tests' process keeps SIGTERM, which must end the tests again."""
    handlers = {number: signal.getsignal(number) for number in signals.SIGNALS}
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def device() -> "torch.device":
    """Give the device of tests marked `gpu`: a GPU if one is visible, as in `make test-gpu`; else the CPU."""
    import torch  # here, because most tests of data_prep start without it

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
