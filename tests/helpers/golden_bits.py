"""Records golden runs to the bit: `python -m tests.helpers.golden_bits --out FILE`.

Every engine on 1 and 2 processes: loss and gradient norm of each step, and the SHA-256 of all final tensors (model,
exp_avg, exp_avg_sq, ema). `golden_bits.json` is the record of commit a2db64e; `test_golden_bits.py` compares with it.
"""

import argparse
import json
import math
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from tests.helpers.golden_runs import ENGINES, make_images, overrides, train_all

RECORD = Path(__file__).with_name("golden_bits.json")
WORLD_SIZES = (1, 2)
RUN_CASES = "ac"
PACKAGES = ("torch", "deepspeed", "numpy", "pillow", "torchvision")
RTOL = 1e-5  # in another environment


def describe_environment() -> dict[str, str]:
    """Describe the environment that decides the last bits: versions, processor, and PyTorch's instruction set."""
    versions = {package: version(package) for package in PACKAGES}
    return {**versions, "cpu": cpu_model(), "capability": torch.backends.cpu.get_cpu_capability()}


def cpu_model() -> str:
    """Return name, family and model number: a virtual machine may name processors of several generations alike."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return f"{facts.get('model name')}, family {facts.get('cpu family')}, model {facts.get('model')}"


def make_runs(world_size: int, images: Path, out: Path) -> dict[str, dict]:
    """Train with every engine on that many processes, and return the bits of each run, by ENGINE-CASE-WORLD_SIZE."""
    runs = [
        {"tag": f"{engine}-{case}-{world_size}", "overrides": choose + overrides(case, world_size)}
        for engine, choose in ENGINES.items()
        for case in RUN_CASES
    ]
    train_all(runs, world_size, images, out, CUDA_VISIBLE_DEVICES="")
    return {run["tag"]: read_bits(out / run["tag"]) for run in runs}


def read_bits(folder: Path) -> dict:
    """Read losses and norms of a run's `metrics.jsonl`, which has a row per step and rounds nothing; null is NaN."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(1, len(train) + 1)), folder
    losses, norms = (
        [(math.nan if row[key] is None else row[key]).hex() for row in train] for key in ("loss", "grad_norm")
    )
    digests = json.loads((folder / "digests.json").read_text())
    return {"losses": losses, "grad_norms": norms, "weights_sha256": digests["end"]}


def find_differences(made: dict[str, dict], wanted: dict[str, dict], *, exact: bool) -> list[str]:
    """List a line for each run that differs, with its first step that does. Without `exact`, compare to RTOL."""
    lines = [f"{tag}: only in one of the two" for tag in sorted(made.keys() ^ wanted.keys())]
    found = {tag: find_difference(made[tag], wanted[tag], exact) for tag in wanted if tag in made}
    return lines + [f"{tag}: {what}" for tag, what in found.items() if what]


def find_difference(made: dict, wanted: dict, exact: bool) -> str | None:
    """Describe the first difference of two runs, if there is one."""
    counts = [len(run[key]) for run in (made, wanted) for key in ("losses", "grad_norms")]
    if len(set(counts)) > 1:
        return f"{counts[0]} steps instead of {counts[2]}"
    for i in range(counts[0]):
        for key in ("losses", "grad_norms"):
            got, want = made[key][i], wanted[key][i]
            x, y = float.fromhex(got), float.fromhex(want)
            if got != want and (exact or not math.isclose(x, y, rel_tol=RTOL)):
                return f"step {i + 1} is the first to differ: {key} {got} ({x:.9g}) instead of {want} ({y:.9g})"
    if exact and made["weights_sha256"] != wanted["weights_sha256"]:
        return f"after step {counts[0]}, with equal losses and gradient norms, the final tensors differ"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        make_images(images)
        runs = {}
        for world_size in WORLD_SIZES:
            runs |= make_runs(world_size, images, Path(folder))
    out.write_text(json.dumps({"environment": describe_environment(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
