"""Workers draw tasks as they get free, every task has its result, errors are the tasks' own; progress is shown."""

import io
import os
import signal
from collections.abc import Iterator

import pytest

from data_prep import workers
from data_prep.workers import Progress, run_tasks
from gcvit.errors import UserError


def square(number: int) -> int:
    return number * number


def refuse_three(number: int) -> int:
    if number == 3:
        raise UserError("three", got=3)
    return number


def process_of(_: int) -> int:
    return os.getpid()


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("num_tasks", [0, 1, 2, 9])
def test_every_task_has_its_result(num_workers, num_tasks):
    results = dict(run_tasks(square, iter(range(num_tasks)), num_workers))
    assert results == {number: number**2 for number in range(num_tasks)}


def test_tasks_are_drawn_a_little_ahead_of_the_workers():
    drawn = 0

    def tasks() -> Iterator[int]:
        nonlocal drawn
        for number in range(1000):
            drawn += 1
            yield number

    running = run_tasks(square, tasks(), 2)
    for num_results in range(1, 6):
        next(running)
        assert drawn <= num_results + 2 * 2
    running.close()


def test_a_single_task_needs_no_process():
    assert dict(run_tasks(process_of, [0], 2)) == {0: os.getpid()}
    assert os.getpid() not in dict(run_tasks(process_of, [0, 1], 2)).values()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_tasks_error_is_the_callers(num_workers):
    with pytest.raises(UserError, match="three: got 3"):
        list(run_tasks(refuse_three, range(1000), num_workers))


def test_a_worker_that_was_killed_is_the_users_to_know():
    with pytest.raises(UserError, match=r"worker process was killed; hint: .*fewer --workers"):
        list(run_tasks(die_at_three, range(10), 2))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show_progress(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    progress = Progress("train", 300)
    for _ in range(3):
        progress.add(100, 5_000_000)
    progress.close()
    assert "samples/s, " in progress.rate
    return stream.getvalue()


def test_a_log_file_gets_lines_of_progress(monkeypatch):
    monkeypatch.setattr(workers, "LOG_SECONDS", 1e-9)
    lines = show_progress(io.StringIO(), monkeypatch)
    assert "\r" not in lines
    assert "\x1b" not in lines
    assert [line.split(" [")[0].rsplit(" ", 1)[-1] for line in lines.splitlines()] == ["100/300", "200/300", "300/300"]
    assert all("MB/s" in line and line.startswith("train: ") for line in lines.splitlines())


def test_a_log_file_gets_no_progress_of_short_work(monkeypatch):
    assert show_progress(io.StringIO(), monkeypatch) == ""


def test_a_terminal_gets_one_line_that_is_cleared(monkeypatch):
    text = show_progress(Terminal(), monkeypatch)
    assert "\n" not in text
    assert "/300" in text
    assert text.split("\r")[-1] == ""
    assert not text.split("\r")[-2].strip()
