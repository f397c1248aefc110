"""The rules of the house, read from the source: who imports whom and which package, how long files get.

`find_breaches(root)` returns one line per breach, so that the last tests can show, on small trees that break one
rule each, that each rule can fail.
"""

import ast
import itertools
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A module imports from floors below its own, or from its own floor within its folder, without a circle. The
# engines stand on the optimizer and the evaluator on parallel.build, hence a floor between them; the contract of
# the engines names the model, which knows nothing of them.
FLOORS = [
    (
        *("gcvit", "gcvit.errors", "gcvit.outcome", "gcvit.progress", "gcvit.notice", "gcvit.watchdog"),
        *("gcvit.train_flags", "gcvit.evaluate_flags"),
        *("gcvit.monitoring", "gcvit.monitoring.stopwatch", "gcvit.monitoring.schema"),
    ),
    (
        *("gcvit.config", "gcvit.config_file", "gcvit.schedule", "gcvit.runlock", "gcvit.devices"),
        *("gcvit.model.kernels", "gcvit.model.kernels.*"),
    ),
    ("gcvit.model", "gcvit.model.*"),
    (
        *("gcvit.data", "gcvit.data.manifest", "gcvit.data.folder", "gcvit.data.source"),
        *("gcvit.data.assignment", "gcvit.data.batch", "gcvit.data.transforms", "gcvit.data.decode"),
        *("gcvit.data.remote", "gcvit.data.shard_cache", "gcvit.data.epochs", "gcvit.data.forkserver"),
        *("gcvit.parallel", "gcvit.parallel.world", "gcvit.parallel.engine", "gcvit.parallel.loss_scale"),
    ),
    ("gcvit.optim", "gcvit.loss", "gcvit.ema", "gcvit.evaluation", "gcvit.evaluation.label_sets"),
    (
        *("gcvit.data.stream", "gcvit.parallel.ddp", "gcvit.parallel.fsdp", "gcvit.parallel.zero"),
        *("gcvit.parallel.zero_settings", "gcvit.parallel.recompute", "gcvit.parallel.budget"),
        "gcvit.parallel.compiled",
    ),
    ("gcvit.parallel.build", "gcvit.monitoring.events", "gcvit.monitoring.stalls"),
    (
        *("gcvit.metrics", "gcvit.evaluator", "gcvit.checkpoint", "gcvit.flat_dcp", "gcvit.preemption"),
        *("gcvit.damage", "gcvit.replicas", "gcvit.saver", "gcvit.runfolder", "gcvit.export", "gcvit.card"),
    ),
    (
        *("gcvit.monitoring.*", "gcvit.evaluation.*", "gcvit.report", "gcvit.report.*", "gcvit.planning"),
        *("gcvit.planning.plan", "gcvit.planning.forecast", "gcvit.planning.micro_batch"),
        *("gcvit.planning.memory", "gcvit.planning.memory_zero", "gcvit.planning.step_trace"),
    ),
    ("gcvit.run", "gcvit.restore", "gcvit.start", "gcvit.nonfinite", "gcvit.predict", "gcvit.export_onnx"),
    ("gcvit.trainer", "gcvit.replay", "gcvit.overfit", "gcvit.planning.text"),
    ("train", "evaluate", "gcvit.__main__"),
]
# What of ours a part may import at most, beyond the floors.
ONLY_FROM_US = {
    "data_prep*": ("gcvit.errors", "gcvit.data.manifest", "data_prep*"),
    "gcvit.model*": ("gcvit.errors", "gcvit.model*"),
}
# Packages that one place alone imports.
ONLY_IN = {
    "deepspeed": ("gcvit.parallel.zero",),
    "tensorboard": ("gcvit.monitoring.events",),
    "torch.utils.tensorboard": ("gcvit.monitoring.events",),
    "wandb": ("gcvit.monitoring.events",),
    "webdataset": ("gcvit.data.stream", "data_prep.*"),
}
# Sharding runs on machines without accelerators, by the hundred: it starts without these.
NOT_IN_DATA_PREP = ("torch", "torchvision", "timm", "deepspeed")
ENTRY_POINTS = FLOORS[-1]
MAX_LINES = 399
MAX_ENTRY_LINES = 59


def matches(module: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(module, pattern) for pattern in patterns)


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_modules(root: Path) -> dict[str, tuple[Path, ast.Module]]:
    """Every module of ours under `root`: dotted name to (relative path, syntax tree)."""
    paths = [
        *root.glob("gcvit/**/*.py"),
        *root.glob("data_prep/**/*.py"),
        root / "train.py",
        root / "evaluate.py",
    ]
    relative = sorted(path.relative_to(root) for path in paths if path.exists())
    return {module_name(path): (path, ast.parse((root / path).read_text())) for path in relative}


def read_imports(tree: ast.Module, ours: set[str]) -> set[str]:
    """Dotted names that a module imports, also inside functions; `from a import b` is a.b if a module.

    Relative imports are left to ruff, which bans them.
    """
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            packages_apart = {name for name in ONLY_IN if name in submodules}
            inner = (submodules & ours) | packages_apart
            names.update(inner if len(inner) == len(node.names) else {*inner, node.module})
    return names


def floor_of(module: str) -> int | None:
    return next((level for level, patterns in enumerate(FLOORS) if matches(module, patterns)), None)


def check_imports(imports: dict[str, set[str]], folders: dict[str, Path]) -> Iterator[str]:
    for module, names in imports.items():
        if not matches(module, ("data_prep*",)) and floor_of(module) is None:
            yield f"{module} has no floor: give it one in FLOORS"
        for name in sorted(names):
            ours = name in imports
            for part, allowed in ONLY_FROM_US.items():
                if ours and matches(module, (part,)) and not matches(name, allowed):
                    yield f"{module} imports {name}; {part} imports nothing of ours but {', '.join(allowed)}"
            for package, places in ONLY_IN.items():
                if (name == package or name.startswith(package + ".")) and not matches(module, places):
                    yield f"{module} imports {package}, which is for {', '.join(places)} alone"
            if matches(module, ("data_prep*",)) and name.split(".")[0] in NOT_IN_DATA_PREP:
                yield f"{module} imports {name}, which data_prep does without"
            own, other = floor_of(module), floor_of(name)
            if ours and own is not None and other is not None:
                neighbour = folders[module] == folders[name] and other == own
                if other >= own and not neighbour:
                    yield f"{module} (floor {own}) imports {name} (floor {other})"


def check_circles(imports: dict[str, set[str]]) -> Iterator[str]:
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> Iterator[str]:
        if module in trail:
            yield "a circle of imports: " + " -> ".join([*trail[trail.index(module) :], module])
        elif module not in done:
            for name in sorted(imports[module] & imports.keys()):
                yield from visit(name, (*trail, module))
            done.add(module)

    for module in imports:
        yield from visit(module, ())


def check_names(paths: list[Path], packages: set[str]) -> Iterator[str]:
    for path in paths:
        if path.stem in ("utils", "util", "helpers", "misc", "common"):
            yield f"{path}: a helper lives beside its first user, not in {path.name}"
        if path.stem in packages and not path.stem.startswith("__"):
            yield f"{path} shadows the package {path.stem}"


def check_danger(path: Path, tree: ast.Module) -> Iterator[str]:
    """Code that runs what a file says: eval, pickle without an allow-list, unsafe YAML, torch.load of objects."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    safe_loaders = {c.name for c in classes if "SafeLoader" in "".join(ast.unparse(b) for b in c.bases)}
    unpicklers = [
        base
        for c in classes
        for base in c.bases
        if any(isinstance(member, ast.FunctionDef) and member.name == "find_class" for member in c.body)
    ]
    for node in ast.walk(tree):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom) and node.module == "pickle":
            yield f"{where}: write pickle.NAME, so that it can be checked"
        if isinstance(node, ast.Import) and any(a.name in ("cPickle", "dill", "cloudpickle") for a in node.names):
            yield f"{where}: no pickle by another name"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            # A subclass of Unpickler that says in find_class what it lets in is the one safe use.
            safe = node in unpicklers if node.attr == "Unpickler" else node.attr == "UnpicklingError"
            if not safe:
                yield f"{where}: pickle.{node.attr} (an Unpickler with an allow-list in find_class is fine)"
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if call in ("eval", "exec"):
            yield f"{where}: {call}"
        if call in ("yaml.load", "yaml.load_all"):
            loader = options.get("Loader") or "".join(ast.unparse(argument) for argument in node.args[1:2])
            if loader not in {"yaml.SafeLoader", "yaml.CSafeLoader", *safe_loaders}:
                yield f"{where}: {call} without a SafeLoader"
        if call in ("yaml.unsafe_load", "yaml.full_load"):
            yield f"{where}: {call}"
        if call == "torch.load" and options.get("weights_only") != "True":
            yield f"{where}: torch.load without weights_only=True"
        if options.get("allow_pickle", "False") != "False":
            yield f"{where}: allow_pickle"


def check_lengths(root: Path) -> Iterator[str]:
    folders = ("gcvit", "data_prep", "tests", "benchmarks")
    for path in itertools.chain(root.glob("*.py"), *(root.glob(f"{folder}/**/*.py") for folder in folders)):
        relative = path.relative_to(root)
        limit = MAX_ENTRY_LINES if module_name(relative) in ENTRY_POINTS else MAX_LINES
        num_lines = len(path.read_text().splitlines())
        if num_lines > limit:
            yield f"{relative} has {num_lines} lines; {limit} at most"


def find_breaches(root: Path) -> list[str]:
    modules = read_modules(root)
    imports = {module: read_imports(tree, set(modules)) for module, (_, tree) in modules.items()}
    paths = {module: path for module, (path, _) in modules.items()}
    packages = {name.split(".")[0] for names in imports.values() for name in names}
    packages = (packages | sys.stdlib_module_names) - {module.split(".")[0] for module in modules}
    return [
        *check_imports(imports, {module: path.parent for module, path in paths.items()}),
        *check_circles(imports),
        *check_names(list(paths.values()), packages),
        *itertools.chain.from_iterable(check_danger(path, tree) for path, tree in modules.values()),
        *check_lengths(root),
    ]


def test_the_house_keeps_its_rules():
    assert len(read_modules(ROOT)) > 5
    breaches = find_breaches(ROOT)
    assert not breaches, "\n" + "\n".join(breaches)


def test_gcvit_and_data_prep_load_neither_torch_nor_timm():
    light = ["gcvit", "gcvit.errors", *(name for name in read_modules(ROOT) if name.startswith("data_prep"))]
    code = f"import sys, {', '.join(light)}; print(sorted({set(NOT_IN_DATA_PREP)!r} & sys.modules.keys()))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"


# One file that breaks a rule, beside what it takes to break it: (files, what the breach says).
BREACHES = {
    "upwards": (
        {"gcvit/config.py": "import gcvit.trainer"},
        "gcvit.config (floor 1) imports gcvit.trainer (floor 10)",
    ),
    "upwards, hidden": (
        {"gcvit/schedule.py": "def f():\n    from gcvit import trainer"},
        "gcvit.schedule (floor 1) imports gcvit.trainer (floor 10)",
    ),
    "own folder upwards": (
        {"gcvit/parallel/world.py": "from gcvit.parallel.zero import X", "gcvit/parallel/zero.py": ""},
        "gcvit.parallel.world (floor 3) imports gcvit.parallel.zero (floor 5)",
    ),
    "sideways": (
        {"gcvit/data/stream.py": "from gcvit.parallel import ddp", "gcvit/parallel/ddp.py": ""},
        "gcvit.data.stream (floor 5) imports gcvit.parallel.ddp (floor 5)",
    ),
    "circle": (
        {"gcvit/ema.py": "import gcvit.loss", "gcvit/loss.py": "import gcvit.ema"},
        "a circle of imports: gcvit.ema -> gcvit.loss -> gcvit.ema",
    ),
    "no floor": ({"gcvit/new.py": ""}, "gcvit.new has no floor"),
    "model": ({"gcvit/model/x.py": "from gcvit.config import Config"}, "gcvit.model.x imports gcvit.config"),
    "data_prep": ({"data_prep/x.py": "import gcvit.config"}, "data_prep.x imports gcvit.config"),
    "data_prep torch": ({"data_prep/x.py": "def f():\n    import torch.nn"}, "data_prep.x imports torch.nn"),
    "deepspeed": ({"gcvit/optim.py": "from deepspeed.ops import adam"}, "gcvit.optim imports deepspeed"),
    "tensorboard": (
        {"gcvit/trainer.py": "from torch.utils import tensorboard"},
        "gcvit.trainer imports torch.utils.tensorboard",
    ),
    "webdataset": ({"gcvit/trainer.py": "import webdataset as wds"}, "gcvit.trainer imports webdataset"),
    "utils": ({"gcvit/model/utils.py": ""}, "not in utils.py"),
    "shadow": ({"gcvit/model/logging.py": ""}, "gcvit/model/logging.py shadows the package logging"),
    "shadow of a dependency": (
        {"gcvit/trainer.py": "import torch", "gcvit/model/torch.py": ""},
        "gcvit/model/torch.py shadows the package torch",
    ),
    "eval": ({"gcvit/config.py": "\nx = eval('1')"}, "gcvit/config.py:2: eval"),
    "pickle": ({"gcvit/config.py": "import pickle\npickle.load(f)"}, "pickle.load"),
    "pickle from": ({"gcvit/config.py": "from pickle import load"}, "write pickle.NAME"),
    "unpickler": (
        {"gcvit/config.py": "import pickle\nclass A(pickle.Unpickler):\n    pass"},
        "pickle.Unpickler",
    ),
    "yaml": ({"gcvit/config.py": "import yaml\nyaml.load(f, yaml.Loader)"}, "yaml.load without a SafeLoader"),
    "torch.load": ({"gcvit/ema.py": "import torch\ntorch.load(f)"}, "torch.load without weights_only=True"),
    "numpy": ({"gcvit/ema.py": "np.load(f, allow_pickle=True)"}, "allow_pickle"),
    "long": ({"tests/test_x.py": "\n" * 400}, "tests/test_x.py has 400 lines"),
    "long entry": ({"train.py": "\n" * 60}, "train.py has 60 lines"),
}


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name in ("gcvit/__init__.py", "gcvit/trainer.py", "gcvit/config.py", "data_prep/__init__.py"):
        files = {name: "", **files}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(("files", "breach"), BREACHES.values(), ids=BREACHES.keys())
def test_each_rule_can_fail(tmp_path, files, breach):
    write_tree(tmp_path, files)
    found = find_breaches(tmp_path)
    assert len(found) == 1
    assert breach in found[0]


def test_what_is_allowed_passes(tmp_path):
    unpickler = "import pickle\nclass A(pickle.Unpickler):\n    def find_class(self, module, name): ...\n"
    loader = "import yaml\nclass L(yaml.SafeLoader): ...\nyaml.load(f, L)\nyaml.safe_load(f)\n"
    files = {
        "gcvit/trainer.py": "from gcvit import plan, config\nimport gcvit.parallel.zero",
        "gcvit/planning/plan.py": "from gcvit.config import Config",
        "gcvit/config.py": loader,
        "gcvit/checkpoint.py": unpickler + "import torch\ntorch.load(f, weights_only=True)",
        "gcvit/data/manifest.py": "from gcvit.errors import UserError",
        "gcvit/errors.py": "",
        "gcvit/parallel/zero.py": "import deepspeed",
        "data_prep/shard.py": "import webdataset\nfrom gcvit.data.manifest import X\nimport data_prep.sources",
        "data_prep/sources.py": "",
        "train.py": "from gcvit.trainer import train",
    }
    write_tree(tmp_path, files)
    assert find_breaches(tmp_path) == []
