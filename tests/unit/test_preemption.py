"""The flag, and what becomes of it in a world of one. Ranks and processes: tests/integration/test_preemption.py."""

import os
import signal
import subprocess
import threading
import time

import pytest
import torch

from gcvit import notice
from gcvit.errors import Preempted
from gcvit.parallel.world import World
from gcvit.preemption import Preemption


@pytest.fixture(autouse=True)
def without_notice(monkeypatch) -> None:
    monkeypatch.setattr(notice, "_is_given", False)


@pytest.fixture
def alone() -> Preemption:
    return Preemption(World(0, 1, torch.device("cpu"), None))  # type: ignore[arg-type]


def wait_for_notice() -> None:
    for _ in range(1000):
        if notice.is_given():
            return
        time.sleep(0.01)
    pytest.fail("no notice was taken")


@pytest.mark.parametrize("number", notice.SIGNALS)
def test_each_signal_is_a_notice_however_often_it_comes(alone, number):
    notice.heed()
    alone.look()
    for _ in range(2):
        os.kill(os.getpid(), number)
        wait_for_notice()
        with pytest.raises(Preempted):
            alone.look()


def test_once_finished_nothing_happens(alone):
    notice.heed()
    alone.close()
    for number in notice.SIGNALS:
        os.kill(os.getpid(), number)
    assert not notice.is_given()


def test_a_process_that_is_started_meanwhile_never_gets_it():
    """Of the loaders' servers that is true of both; a compiler may be ended by SIGTERM."""
    notice.heed()

    def blocked_in_a_child() -> set[int]:
        lines = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
        mask = next(int(line.split()[1], 16) for line in lines.splitlines() if line.startswith("SigBlk"))
        return {number for number in notice.SIGNALS if mask & 1 << number - 1}

    assert blocked_in_a_child() == {signal.SIGUSR1}
    with notice.held_back():
        assert blocked_in_a_child() == set(notice.SIGNALS)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # other threads would let it through
        assert not notice.is_given()
    wait_for_notice()
    assert blocked_in_a_child() == {signal.SIGUSR1}
