"""A user's error is one line and exit code 2; everything else is a traceback and exit code 1."""

import sys

import pytest

from gcvit.errors import UserError
from tests.helpers.launching import python


def test_the_message_has_what_got_expected_hint():
    error = UserError("unknown key", got="lrr", expected="lr", hint="write lr")
    assert str(error) == "unknown key: got lrr; expected: lr; hint: write lr"
    assert str(UserError("no data")) == "no data"
    assert str(UserError("too few", got=0)) == "too few: got 0"
    assert isinstance(error, ValueError)


def run_main(body: str, **environment: str):
    lines = [
        "import sys",
        "from gcvit.errors import UserError",
        "from gcvit.runtime.entrypoint import run_main",
        "def main():",
    ]
    code = "\n".join([*lines, *(f"    {line}" for line in body.splitlines()), "run_main(main)"])
    return python("-c", code, timeout=60, **environment)


def test_a_user_error_is_one_line_and_exit_code_2():
    done = run_main("print('before', end='')\nraise UserError('no such\\n  file', got='a\\nb')")
    assert (done.returncode, done.stdout) == (2, "before")
    assert done.stderr == "error: no such file: got a b\n"


def test_a_user_error_does_not_wait_for_threads_and_exit_handlers():
    body = """
import atexit, threading, time
atexit.register(print, "late")
threading.Thread(target=time.sleep, args=(50,)).start()
raise UserError("now")
"""
    done = run_main(body.strip())
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: now\n")


def test_of_many_ranks_the_first_of_each_node_speaks():
    assert run_main("raise UserError('x')", RANK="0", LOCAL_RANK="0").stderr == "error: x\n"
    done = run_main("raise UserError('x')", RANK="1", LOCAL_RANK="1")
    assert (done.returncode, done.stderr) == (2, "")
    assert run_main("raise UserError('x')", RANK="8", LOCAL_RANK="0").stderr == "error (rank 8): x\n"


def test_what_one_rank_alone_meets_is_said_by_it():
    done = run_main("error = UserError('x')\nerror.rank_local = True\nraise error", RANK="3", LOCAL_RANK="3")
    assert (done.returncode, done.stderr) == (2, "error (rank 3): x\n")


@pytest.mark.parametrize(("body", "code"), [("pass", 0), ("raise ValueError('ours')", 1), ("sys.exit(7)", 7)])
def test_all_else_is_as_ever(body, code):
    done = run_main(body)
    assert done.returncode == code
    assert ("Traceback" in done.stderr) == (code == 1)


def test_errors_are_quick_to_load():
    done = python("-c", "import sys, gcvit.config.schema; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, "a misspelt key would be told only after torch was loaded"
    assert sys.version_info >= (3, 11)
