"""Check the nodes of a job before it starts. preflight.sh runs this.

    inspect ANSWERS ENTRY ARGUMENT... on each node: write what it sees to ANSWERS/HOST.json
    judge ANSWERS HOST...             on the first node: compare; name the bad ones on stderr, list them on stdout
    silent ANSWERS HOST...            after an all-reduce that failed: the nodes that did not take part

Exit code 0: fit; 1: bad nodes; 2: the command is wrong on every node.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from gcvit.config import evaluate_cli, train_cli
from gcvit.errors import UserError
from gcvit.runtime.entrypoint import run_main

MAX_CLOCK_SECONDS = 10.0  # the lock of the run folder compares the times of two nodes
READ_BYTES = 256 << 20
ALIKE = ("code", "python", "torch", "data")  # must be equal on all nodes


def host() -> str:
    """Return this node's name, as SLURM has it."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def read_command(entry: str, arguments: list[str]) -> tuple[str | None, Any]:
    """Return the place of the data, and the config, or None for an evaluation.

    Raises:
        UserError: if the command or the config is wrong.
    """
    sys.argv = [entry, *arguments]
    if Path(entry).stem != "train":
        return evaluate_cli.parse_arguments(None).data_dir, None
    from gcvit.config.load import load_config

    given = train_cli.parse_arguments(None)
    config, _ = load_config(given.config, given.overrides, {"data.dir": given.data_dir, "tag": given.tag})
    return config.data.dir, config


# ---- each node alone --------------------------------------------------------------------------------------------


def inspect_node(answers: Path, entry: str, arguments: list[str]) -> None:
    problems: list[str] = []
    answer: dict[str, Any] = {"host": host(), "problems": problems, "refused": None}
    answer |= {"code": digest_code(), "python": platform.python_version()}
    try:
        answer["torch"] = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        answer["torch"] = "missing"
    data = config = None
    try:
        data, config = read_command(entry, arguments)
    except UserError as error:
        answer["refused"] = str(error)
    except SystemExit as end:  # of argparse, which has printed why
        if end.code != 2:
            raise
        answer["refused"] = "the command line is not understood"
    if data is not None and "://" not in data:
        answer["data"] = digest_names(Path(data))
        answer["read_mb"] = read_speed(Path(data), problems)
    if config is not None:
        check_writable(Path(config.output_dir), problems)
    check_gpus(problems)
    # The node's time is compared with the file system's, which dates the file.
    part = answers / f"{host()}.tmp"
    part.write_text(json.dumps(answer | {"time": time.time()}))
    part.rename(part.with_suffix(".json"))


def digest_code() -> str:
    digest = hashlib.sha256()
    for path in sorted([*Path().glob("*.py"), *Path("gcvit").rglob("*.py"), *Path("data_prep").rglob("*.py")]):
        digest.update(f"{path} ".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def digest_names(data: Path) -> str:
    """Hash the names of the data's folders and of the files directly in them."""
    names = sorted(str(path.relative_to(data)) for path in [*data.glob("*"), *data.glob("*/*")])
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


def read_speed(data: Path, problems: list[str]) -> float | None:
    """Measure the MB/s of reading a shard, a different one on each node. None for folders of images."""
    if not data.is_dir() or not any(data.iterdir()):  # empty: not mounted here
        problems.append(f"does not see the data {data}")
        return None
    shards = sorted([*data.glob("*.tar"), *data.glob("*/*.tar")])  # no deeper, where millions of images may lie
    if not shards:
        return None
    shard = shards[int(os.environ.get("SLURM_NODEID", 0)) % len(shards)]
    begin, num_bytes = time.perf_counter(), 0
    try:
        with open(shard, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while num_bytes < READ_BYTES and (piece := file.read(4 << 20)):
                num_bytes += len(piece)
    except OSError as error:
        problems.append(f"cannot read {shard} ({error.strerror})")
        return None
    speed = num_bytes / 1e6 / (time.perf_counter() - begin)
    if speed < float(os.environ.get("MIN_READ_MB", 0)):
        problems.append(f"reads {shard} with {speed:.0f} MB/s, MIN_READ_MB={os.environ['MIN_READ_MB']}")
    return speed


def check_writable(output: Path, problems: list[str]) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        trial = output / f".preflight.{host()}.{os.getpid()}"
        trial.write_bytes(b"x" * 4096)
        trial.unlink()
    except OSError as error:
        problems.append(f"cannot write to {output} ({error.strerror})")


def check_gpus(problems: list[str]) -> None:
    """Check that there are as many GPUs as processes, if the node has nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return
    done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30)
    found = done.stdout.count("UUID: GPU")
    if done.returncode or found < int(os.environ["PROCESSES"]):
        problems.append(f"has {found} working GPUs, {os.environ['PROCESSES']} wanted")


def judge(answers: Path, hosts: list[str]) -> None:
    found = {
        path.stem: json.loads(path.read_bytes()) | {"landed": path.stat().st_mtime} for path in answers.glob("*.json")
    }
    if found and all(answer["refused"] for answer in found.values()):
        raise UserError(next(iter(found.values()))["refused"])
    problems = {name: ["does not answer, or does not see JOBS_DIR or the code"] for name in hosts if name not in found}
    for answer in found.values():
        if answer["refused"]:  # by this node alone: it may not see the config
            answer["problems"].append(answer["refused"])
    fit = {name: answer for name, answer in found.items() if not answer["problems"]}  # the others are named anyway
    for key in ALIKE:
        values = Counter(str(answer.get(key)) for answer in fit.values()).most_common()
        # If no value has a majority, any node may be wrong.
        usual = values[0][0] if values and 2 * values[0][1] > len(fit) else "other ones"
        for name, answer in fit.items():
            if str(answer.get(key)) != usual:
                problems.setdefault(name, []).append(f"has {key} {answer.get(key)}, the others {usual}")
    # The difference to the file system's clock. Subtracting the median removes the time of writing.
    ahead = {name: answer["time"] - answer["landed"] for name, answer in found.items()}
    for name, answer in found.items():
        difference = ahead[name] - sorted(ahead.values())[len(ahead) // 2]
        if abs(difference) > MAX_CLOCK_SECONDS:
            problems.setdefault(name, []).append(f"its clock is {difference:+.0f} s off")
        if answer["problems"]:
            problems.setdefault(name, []).extend(answer["problems"])
    speeds = sorted(answer["read_mb"] for answer in found.values() if answer.get("read_mb"))
    if speeds:
        print(f"pre-flight: a shard is read with {speeds[0]:.0f} to {speeds[-1]:.0f} MB/s", file=sys.stderr)
    end_with(problems, len(hosts))


def end_with(problems: dict[str, list[str]], num_hosts: int) -> None:
    for name, words in sorted(problems.items()):
        print(f"pre-flight: bad node {name}: {'; '.join(words)}", file=sys.stderr)
    if problems:
        if len(problems) < num_hosts:  # if all are bad, none can be excluded
            print(",".join(sorted(problems)))
        sys.exit(1)
    print(f"pre-flight: {num_hosts} nodes alike and fit", file=sys.stderr)


def name_silent(answers: Path, hosts: list[str]) -> None:
    num_processes = int(os.environ["PROCESSES"])
    came = {name: len(list(answers.glob(f"{name}.*.came"))) for name in hosts}
    silent = {
        name: [f"only {number} of its {num_processes} processes came to the all-reduce"]
        for name, number in came.items()
        if number < num_processes
    }
    if not silent or len(silent) == len(hosts):
        print(f"pre-flight: the all-reduce among {', '.join(hosts)} failed", file=sys.stderr)
        sys.exit(1)
    end_with(silent, len(hosts))


def main() -> None:
    os.environ.pop("GCVIT_REPORT_DIR", None)  # for the reports of the training itself
    what, answers, *others = sys.argv[1:]
    if what == "inspect":
        inspect_node(Path(answers), others[0], others[1:])
    elif what == "judge":
        judge(Path(answers), others)
    else:
        name_silent(Path(answers), others)


if __name__ == "__main__":
    run_main(main)
