"""The Triton kernels: right in Triton's interpreter, and compiled for GPUs. Both on machines without one.

The files in kernels/ are ordinary tests, and run by hand as below. Triton takes either way for a whole process, from
the start, so that each has its own here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "kernels"
ROOT = FOLDER.parents[2]


def run_tests(file: str, folder: Path, *, is_interpreted: bool, is_slow: bool) -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": "1" if is_interpreted else "0",
        "TRITON_CACHE_DIR": str(folder),
        "PYTEST_ADDOPTS": "",
    }
    marker = "slow" if is_slow else "not slow"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker, str(FOLDER / file)]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-10_000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


@pytest.mark.parametrize("file", ["numbers.py", "operators.py"])
def test_in_the_interpreter(file: str, tmp_path: Path) -> None:
    run_tests(file, tmp_path, is_interpreted=True, is_slow=False)


def test_as_machine_code(tmp_path: Path) -> None:
    run_tests("machine_code.py", tmp_path, is_interpreted=False, is_slow=False)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "is_interpreted"), [("numbers.py", True), ("machine_code.py", False)])
def test_all_windows(file: str, is_interpreted: bool, tmp_path: Path) -> None:
    run_tests(file, tmp_path, is_interpreted=is_interpreted, is_slow=True)
