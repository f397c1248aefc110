"""A real SLURM of three nodes on this machine, and jobs on it."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.launching import ROOT, environment

SCRIPT = Path(__file__).with_name("cluster.sh")
# What jobs find in the folder from which they are submitted.
LINKS = ("gcvit", "data_prep", "launch", "configs", "tests", "evaluate.py")


class Cluster:
    """`root`: where all of its files go, and the folder `tree` that jobs are submitted from."""

    def __init__(self, root: Path, python: str, **settings: str):
        self.root, self.tree, self.python = root, root / "tree", python
        self._settings = {"SLAB_DIR": str(root / "slab"), **settings}
        self.tree.mkdir(parents=True)
        for name in LINKS:
            (self.tree / name).symlink_to(ROOT / name)
        (self.tree / "train.py").symlink_to(Path(__file__).with_name("disturbed_train.py"))

    def call(self, *words: object, timeout: float = 60, check: bool = True, **variables: str) -> str:
        """What `cluster.sh words...` writes to standard output, in `tree`."""
        inherited = {name: value for name, value in environment().items() if not name.startswith(("SLURM_", "SBATCH_"))}
        # OMP_NUM_THREADS stays 1: sums keep their order.
        own = {"PYTHON": self.python, "JOBS_DIR": str(self.root / "jobs"), "TASKS_PER_NODE": "1", "PREFLIGHT": "off"}
        own |= {"PYTHONPATH": "", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        environ = inherited | self._settings | own | variables
        command = ["bash", str(SCRIPT), *map(str, words)]
        done = subprocess.run(command, cwd=self.tree, env=environ, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0 or not check, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def run(self, *words: object, **options) -> str:
        return self.call("exec", *words, **options)

    def submit(self, *words: object, **variables: str) -> "Job":
        return Job(self, self.run("sbatch", "--parsable", *words, **variables).strip())

    def wait_until_idle(self) -> None:
        """Until all nodes are ready for the next job."""
        wait_for(lambda: self.run("sinfo", "-hN", "-p", "lab", "-t", "idle").count("node") == 3, 60)


class Job:
    def __init__(self, cluster: Cluster, number: str):
        self._cluster, self.number = cluster, number

    def show(self) -> dict[str, str]:
        text = self._cluster.run("scontrol", "show", "job", "--oneliner", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    @property
    def log(self) -> str:
        path = next(self._cluster.tree.glob(f"*-{self.number}.log"), None)
        return path.read_text(errors="replace") if path else ""

    def wait_for_log(self, pattern: str, seconds: float = 120, start: int = 0) -> None:
        """Until the log, from character `start` on, has the pattern."""
        wait_for(lambda: re.search(pattern, self.log[start:]), seconds, lambda: f"no {pattern}:\n{self.log[-6000:]}")

    def end(self, seconds: float = 240) -> dict[str, str]:
        """What SLURM says of it once it has ended."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        wait_for(lambda: self.show()["JobState"] in ended, seconds, lambda: f"{self.show()}\n{self.log[-6000:]}")
        return self.show()

    def complete(self, restarts: int = 0) -> "Job":
        shown = self.end()
        assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", str(restarts)), self.log[-6000:]
        return self

    def warn(self) -> None:
        """What SLURM does before a time limit."""
        self._cluster.run("scancel", "--batch", "--signal=USR1", self.number)

    def signal_rank(self, node: str, signal: str, rank: int) -> None:
        """From outside, as the system's killer for memory does."""
        script = f"""for pid in $(pgrep -f 'train[.]py'); do
            if tr '\\0' '\\n' < /proc/$pid/environ | grep -qx 'LOCAL_RANK=.*' &&
                tr '\\0' '\\n' < /proc/$pid/environ | grep -qx RANK={rank}; then kill -{signal} $pid; fi
        done"""
        self._cluster.call("exec", "-n", node, "bash", "-c", script)


def wait_for(condition: Callable[[], object], seconds: float, describe: Callable[[], str] = lambda: "") -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s; {describe()}"
        time.sleep(0.3)


def losses(run_dir: Path) -> dict[int, float]:
    """By step; each step must be there once, in order."""
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    found = [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]
    assert [step for step, _ in found] == list(range(1, len(found) + 1))
    return dict(found)


def why_not() -> str | None:
    """Why no cluster can run here; None where one can."""
    tools = ("slurmctld", "slurmd", "sbatch", "munged", "sshd", "pdsh", "ip", "unshare", "nsenter", "pgrep")
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [tool for tool in tools if not any(os.access(f"{folder}/{tool}", os.X_OK) for folder in path.split(":"))]
    if missing:
        return (
            f"SLURM's tests need {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge openssh-server pdsh)"
        )
    if os.geteuid():
        return "SLURM's tests need root, for namespaces and daemons"
    # What containers forbid, and what a kernel may lack: the links between the nodes.
    trial = "mount -t tmpfs tmpfs /run && ip link add br0 type bridge && ip link add veth0 type veth peer name veth1"
    namespaces = ["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    done = subprocess.run([*namespaces, "sh", "-ec", trial], capture_output=True, text=True, env={"PATH": path})
    return f"SLURM's tests need namespaces and links: {done.stderr.strip()}" if done.returncode else None
