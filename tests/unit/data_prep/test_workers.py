"""Tasks are taken as workers get free, results come whole, errors are the tasks' own."""

import os
import signal
from collections.abc import Iterator

import pytest

from data_prep.workers import run_tasks
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


def test_tasks_are_taken_a_little_ahead_of_the_workers():
    taken = 0

    def tasks() -> Iterator[int]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield number

    running = run_tasks(square, tasks(), 2)
    for num_results in range(1, 6):
        next(running)
        assert taken <= num_results + 2 * 2
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
