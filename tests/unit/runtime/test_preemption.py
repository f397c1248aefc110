"""The preemption flag, and what follows from it in a world of one. More ranks: tests/integration/test_preemption.py."""

import os
import signal
import subprocess
import threading
import time

import pytest
import torch

from gcvit.errors import Preempted
from gcvit.runtime import signals
from gcvit.runtime.distributed import World
from gcvit.runtime.preemption import Preemption


@pytest.fixture(autouse=True)
def no_signal_yet(monkeypatch) -> None:
    monkeypatch.setattr(signals, "_is_received", False)


@pytest.fixture
def alone() -> Preemption:
    return Preemption(World(0, 1, torch.device("cpu"), None))  # type: ignore[arg-type]


def wait_for_signal() -> None:
    for _ in range(1000):
        if signals.is_received():
            return
        time.sleep(0.01)
    pytest.fail("no signal was received")


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_each_signal_preempts_however_often_it_comes(alone, number):
    signals.install_handlers()
    alone.raise_if_requested()
    for _ in range(2):
        os.kill(os.getpid(), number)
        wait_for_signal()
        with pytest.raises(Preempted):
            alone.raise_if_requested()


def test_once_finished_nothing_happens(alone):
    signals.install_handlers()
    alone.close()
    for number in signals.SIGNALS:
        os.kill(os.getpid(), number)
    assert not signals.is_received()


def test_a_process_that_is_started_meanwhile_never_gets_it():
    """The servers of the loaders receive neither signal; a compiler receives SIGTERM."""
    signals.install_handlers()

    def blocked_in_a_child() -> set[int]:
        lines = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
        mask = next(int(line.split()[1], 16) for line in lines.splitlines() if line.startswith("SigBlk"))
        return {number for number in signals.SIGNALS if mask & 1 << number - 1}

    assert blocked_in_a_child() == {signal.SIGUSR1}
    with signals.block_signals():
        assert blocked_in_a_child() == set(signals.SIGNALS)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # other threads would let it through
        assert not signals.is_received()
    wait_for_signal()
    assert blocked_in_a_child() == {signal.SIGUSR1}
