"""Starting real processes from tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child: one thread each, and none of this process's place in a group."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


def run(*command: object, timeout: float = 300, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the project's root; its output is captured and its exit code is the caller's to judge."""
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=timeout)


def python(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, *arguments, **options)


def torchrun(num_processes: int, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """`torchrun` on this machine, on a port of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    return python(*launcher, *arguments, **options)


def succeed(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, f"{done.args}\nexit {done.returncode}\n{done.stdout}\n{done.stderr[-6000:]}"
    return done
