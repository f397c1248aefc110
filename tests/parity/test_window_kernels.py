"""The Triton kernels are right in Triton's interpreter, compile for GPUs, and are right on a GPU if there is one.

The files in kernels/ are ordinary tests. Triton interprets or compiles for the whole life of a process, so each file
runs in a process of its own. The first two need no GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "kernels"
ROOT = FOLDER.parents[2]
# Seconds, where other work shares the cores. The slow ones are many.
TIMEOUT, SLOW_TIMEOUT = 900, 7200

pytestmark = pytest.mark.timeout(TIMEOUT)


def run_tests(file: str, folder: Path, *, is_interpreted: bool, is_slow: bool) -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": "1" if is_interpreted else "0",
        "TRITON_CACHE_DIR": str(folder),
        "PYTEST_ADDOPTS": "",
    }
    marker = "slow" if is_slow else "not slow"
    options = ["-q", "-p", "no:cacheprovider", "-m", marker, f"--timeout={TIMEOUT}"]
    command = [sys.executable, "-m", "pytest", *options, str(FOLDER / file)]
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
@pytest.mark.timeout(SLOW_TIMEOUT)
@pytest.mark.parametrize(("file", "is_interpreted"), [("numbers.py", True), ("machine_code.py", False)])
def test_all_windows(file: str, is_interpreted: bool, tmp_path: Path) -> None:
    run_tests(file, tmp_path, is_interpreted=is_interpreted, is_slow=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    ("file", "is_slow"),
    [("numbers.py", False), ("operators.py", False), pytest.param("numbers.py", True, marks=pytest.mark.slow)],
)
def test_on_a_gpu(file: str, is_slow: bool, tmp_path: Path) -> None:
    run_tests(file, tmp_path, is_interpreted=False, is_slow=is_slow)
