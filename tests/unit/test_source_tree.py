"""Rules of the source tree that no linter checks; import-linter checks who imports whom."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRODUCT = [*ROOT.glob("gcvit/**/*.py"), *ROOT.glob("data_prep/**/*.py"), ROOT / "train.py", ROOT / "evaluate.py"]
ALL = [*PRODUCT, *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
# Sharding runs on machines without accelerators, on hundreds at a time: it starts without these.
NOT_IN_DATA_PREP = {"torch", "torchvision", "timm", "deepspeed"}
UNSAFE = {
    "pickle": r"^\s*(?:import|from) +(?:pickle|cPickle|dill|cloudpickle|marshal|shelve)\b",
    "torch.load": r"torch\.load\((?!.*weights_only=True)",
    "numpy pickle": r"allow_pickle=True",
    "eval": r"(?<![\w.])(?:eval|exec)\(",
    "yaml": r"yaml\.(?:unsafe_load|full_load|Loader|UnsafeLoader|FullLoader)\b",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def find_unsafe(text: str) -> list[str]:
    return [name for name, pattern in UNSAFE.items() if re.search(pattern, text, re.MULTILINE)]


def test_files_are_at_most_400_lines_and_entry_points_60():
    limits = {path: 60 if path.parent == ROOT else 400 for path in ALL}
    long = [f"{path.relative_to(ROOT)}" for path, limit in limits.items() if len(path.read_text().splitlines()) > limit]
    assert not long


def test_data_prep_loads_neither_torch_nor_timm():
    light = [
        "gcvit",
        "gcvit.errors",
        *(module_name(path) for path in PRODUCT if path.is_relative_to(ROOT / "data_prep")),
    ]
    code = f"import sys, {', '.join(light)}; print(sorted({NOT_IN_DATA_PREP!r} & sys.modules.keys()))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"


def test_no_module_is_a_drawer_of_helpers():
    drawers = {"utils", "util", "helpers", "misc", "common"}
    assert not [path for path in PRODUCT if path.stem in drawers]


def test_nothing_runs_what_a_file_says():
    # An Unpickler with an allow-list is the one use of pickle, until checkpoints do without.
    allowed = {ROOT / "gcvit/checkpoint/shard_files.py": ["pickle"]}
    found = {path: find_unsafe(path.read_text()) for path in PRODUCT}
    assert {path: names for path, names in found.items() if names} == allowed


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import pickle", "pickle"),
        ("def f():\n    from dill import loads", "pickle"),
        ("torch.load(file)", "torch.load"),
        ("np.load(file, allow_pickle=True)", "numpy pickle"),
        ("x = eval(text)", "eval"),
        ("yaml.load(file, yaml.Loader)", "yaml"),
    ],
)
def test_each_unsafe_call_is_found(text, name):
    assert find_unsafe(text) == [name]
    assert find_unsafe("torch.load(file, weights_only=True); model.eval(); yaml.safe_load(file)") == []
