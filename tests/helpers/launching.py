"""Start real processes from tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


# A child is no rank of this process's group and, where make started the tests, no part of that make.
NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MAKELEVEL", "MAKEFLAGS", "MFLAGS")


def environment(**extra: str) -> dict[str, str]:
    """Make the environment of a child: one thread each, and a place of its own."""
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


def run(*command: object, timeout: float = 300, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the project's root, capture its output, and leave its exit code to the caller."""
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=timeout)


def python(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, *arguments, **options)


def torchrun(num_processes: int, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """Run `torchrun` on this machine, on a port of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    return python(*launcher, *arguments, **options)


def succeed(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, f"{done.args}\nexit {done.returncode}\n{done.stdout}\n{done.stderr[-6000:]}"
    return done
