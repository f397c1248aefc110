"""Rules of the source tree that no linter checks; import-linter checks who imports whom."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import LONG_FILES

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
# What starts ranks in a test: each is a function or class of tests/helpers, or a helper of a test file by itself.
STARTS_RANKS = {"torchrun", "Trainings", "TORCHRUN", "train_all"}


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
    found = {path: find_unsafe(path.read_text()) for path in PRODUCT}
    assert not {path: names for path, names in found.items() if names}


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


def find_imports(text: str) -> set[str]:
    """Find the modules that a file imports, at any place in it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_unit_tests_and_helpers_import_nothing_from_other_folders_of_tests():
    others = {"unit": ("tests.integration", "tests.parity")}
    others["helpers"] = (*others["unit"], "tests.unit")
    found = [
        f"{path.relative_to(ROOT)}: {module}"
        for folder, forbidden in others.items()
        for path in ROOT.glob(f"tests/{folder}/**/*.py")
        for module in find_imports(path.read_text())
        if module.startswith(forbidden)
    ]
    assert not found


def find_unmarked(text: str) -> list[str]:
    """Find the tests that start ranks, by themselves or through functions of their file, and are not marked `dist`."""
    tree = ast.parse(text)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    uses = {
        name: {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)} | {a.arg for a in node.args.args}
        for name, node in functions.items()
    }
    starting = set(STARTS_RANKS)
    while more := {name for name, used in uses.items() if name not in starting and used & starting}:
        starting |= more
    tests = [node for name, node in functions.items() if name.startswith("test_") and name in starting]
    is_marked = re.search(r"^pytestmark = .*mark\.dist\b", text, re.MULTILINE)
    marks = {node.name: " ".join(map(ast.unparse, node.decorator_list)) for node in tests}
    return [] if is_marked else [name for name, decorators in marks.items() if "mark.dist" not in decorators]


def test_tests_that_start_ranks_are_marked():
    found = {path.name: find_unmarked(path.read_text()) for path in ROOT.glob("tests/integration/**/test_*.py")}
    assert not {name: tests for name, tests in found.items() if tests}


def test_an_unmarked_test_is_found():
    body = "def start():\n    torchrun(2)\n\ndef test_a(start):\n    pass\n\ndef test_b():\n    pass\n"
    assert find_unmarked(body) == ["test_a"]
    assert find_unmarked(f"pytestmark = [pytest.mark.dist, pytest.mark.slow]\n{body}") == []
    assert find_unmarked(body.replace("def test_a", "@pytest.mark.dist\ndef test_a")) == []


def test_the_long_files_exist():
    """A file that was renamed would begin last."""
    assert not [name for name in LONG_FILES if not (ROOT / "tests" / name).exists()]
