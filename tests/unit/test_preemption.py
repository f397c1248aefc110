"""The flag, and what becomes of it in a world of one. Ranks and processes: tests/integration/test_preemption.py."""

import os
import signal
import subprocess
import threading

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


@pytest.mark.parametrize("number", notice.SIGNALS)
def test_each_signal_is_a_notice_however_often_it_comes(alone, number):
    notice.heed()
    alone.look()
    for _ in range(2):
        os.kill(os.getpid(), number)
        assert notice.is_given()
        with pytest.raises(Preempted):
            alone.look()


def test_once_finished_nothing_happens(alone):
    notice.heed()
    alone.close()
    for number in notice.SIGNALS:
        os.kill(os.getpid(), number)
    assert not notice.is_given()


def test_a_process_that_is_started_meanwhile_never_gets_it():
    notice.heed()

    def blocked_in_a_child() -> int:
        lines = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
        return next(int(line.split()[1], 16) for line in lines.splitlines() if line.startswith("SigBlk"))

    wanted = sum(1 << number - 1 for number in notice.SIGNALS)
    with notice.held_back():
        assert blocked_in_a_child() & wanted == wanted
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)  # other threads would let it through
        assert not notice.is_given()
    assert notice.is_given(), "it was lost"
    assert blocked_in_a_child() & wanted == 0
