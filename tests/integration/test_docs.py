"""The guides: commands parse as they stand, those for a laptop run, links lead somewhere, quoted messages exist.

The README has a test of its own, which runs more.
"""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from gcvit.config.load import load_config
from gcvit.model import create_model
from tests.helpers.command_lines import Command, find_commands, read_command
from tests.helpers.launching import ROOT, environment
from tests.integration.test_readme import picture

pytestmark = pytest.mark.docs

DOCS = sorted((ROOT / "docs").glob("*.md"))
TOP = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
each_page = pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
TOOLS = ("python", "torchrun", "deepspeed", "sbatch")
# What starts no tool of ours, and what says that it exists.
OTHERS = {
    "make": lambda words: f"\n{words[1]}: " in (ROOT / "Makefile").read_text(),
    "source": lambda words: words[1].startswith(".venv/") or (ROOT / words[1]).is_file(),
    "salloc": lambda words: (ROOT / words[5]).is_file() and words[6] in ("train.py", "evaluate.py"),
    "tensorboard": lambda words: words[1:] == ["--logdir", "runs"],
    "launch/hostfile.sh": lambda words: "--slots)" in script(words) or "--slots ]]" in script(words),
    "launch/wheelhouse.sh": lambda words: f"\n{words[1]}() {{" in script(words),
}


def script(words: list[str]) -> str:
    return (ROOT / words[0]).read_text()


def read_page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


# ---- commands ----------------------------------------------------------------------------------------------------


def check(line: str) -> None:
    """A command's words are known to what it starts, and its config has its options."""
    words = shlex.split(line)
    if words[0] not in TOOLS:
        assert OTHERS[words[0]](words), line
        return
    module, arguments = read_command(line)
    if module == "train" and (ROOT / arguments.config).is_file():
        load_config(ROOT / arguments.config, arguments.overrides)
    if module == "train":
        assert arguments.config.startswith("runs/") or (ROOT / arguments.config).is_file(), line


@each_page
def test_commands_parse_as_they_stand(page):
    for command in find_commands(page.read_text()):
        check(command.line)


@pytest.mark.parametrize(
    "line",
    [
        "python train.py --config configs/gc_vit_tiny.yaml --data /data/x",
        "python train.py --config configs/gc_vit_tinny.yaml",
        "python train.py --config configs/gc_vit_tiny.yaml optim.lrr=1",
        "python -m gcvit.export runs/x --output y",
        "sbatch --node 4 launch/train.sbatch configs/gc_vit_tiny.yaml",
        "launch/wheelhouse.sh collect wheels",
        "make instal",
    ],
)
def test_a_mistake_in_a_command_is_found(line):
    with pytest.raises((SystemExit, ValueError, AssertionError)):
        check(line)


@each_page
def test_blocks_are_of_a_known_kind(page):
    kinds = re.findall(r"^ *```(\w*)$", page.read_text(), flags=re.MULTILINE)
    assert len(kinds) % 2 == 0
    assert set(kinds) <= {"", "bash", "python"}
    for word in ("python -m", "python train", "sbatch --", "torchrun --"):
        lines = re.findall(rf"^ *{word} .*$", page.read_text(), flags=re.MULTILINE)
        assert {line.strip().rstrip("\\ ") for line in lines} <= {
            part.strip() for command in find_commands(page.read_text()) for part in [command.line]
        } | {line.strip().rstrip("\\ ") for line in lines if line.endswith("\\")}, "a command outside of a bash block"


SMALL = (
    "model.img_size=32 'model.overrides={width: 16, depths: [2, 2, 2, 2], num_heads: [1, 2, 4, 8]}' "
    "global_batch_size=8 schedule.warmup='0 steps' schedule.cosine='2 steps' schedule.cooldown='0 steps' "
    "data.num_workers=0 augment.mix=null model.num_classes=5 ema=null optim.frozen_backbone=null precision=fp32"
)


def scale_down(command: Command, checkout: Path) -> str | None:
    """What of a guide a laptop does in seconds: the same tools on few images, with a tiny model. None: not at all."""
    line = command.line.replace("/data/imagenet-wds", "/data/flowers-wds").replace("/data/imagenet", "/data/flowers")
    if line.startswith(("make ", "source ", "tensorboard ")) or "--overfit-one-batch" in line or "digits" in line:
        return None  # `make demo` takes the digits' way
    if "evaluate.py runs/first" in line:
        return None
    line = re.sub(r"--init-from \S+ --reset-head|--batch-size auto|--plan.*", "", line)
    line = re.sub(r"model\.(num_classes|img_size)=\d+ ?", "", line)
    if " train.py " in line:
        line = f"{line} {SMALL}" if "--plan" not in command.line else f"{line} --plan --gpus 1 --gpu l4 {SMALL}"
    if "data_prep.shard" in line and "--val-fraction" not in line:
        line += " --val-fraction 0.2"
    return line.replace("cat.jpg", "/data/flowers/rose/0.jpg").replace("/data/", f"{checkout}/data/")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first_run", "fine_tuning"])
def test_a_guide_works_from_top_to_bottom(name, tmp_path):
    for part in ("train.py", "evaluate.py", "configs"):
        (tmp_path / part).symlink_to(ROOT / part)
    for label, flower in enumerate(("daisy", "rose", "tulip", "lily", "iris")):
        folder = tmp_path / "data/flowers" / flower
        folder.mkdir(parents=True)
        for i in range(12):
            (folder / f"{i}.jpg").write_bytes(picture(50 * label + i))
    on_cpu = environment(PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin", CUDA_VISIBLE_DEVICES="")
    lines = [line for command in find_commands(read_page(name)) if (line := scale_down(command, tmp_path))]
    assert len(lines) >= 7
    for line in lines:
        bash = ["bash", "-euc", line]
        done = subprocess.run(bash, cwd=tmp_path, env=on_cpu, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr[-4000:]}"
    (card,) = [*tmp_path.glob("runs/*/export/README.md"), *tmp_path.glob("data/flowers-model/README.md")]
    assert "pipeline_tag: image-classification" in card.read_text()


# ---- links and names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*TOP, *DOCS], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path) if path else page
        assert place.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", place.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, target


def test_every_package_has_its_tests_in_the_table():
    """CONTRIBUTING.md: for each folder of code, a command whose paths exist."""
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    tests = dict(rows)
    packages = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("gcvit/*/__init__.py")}
    assert packages | {"data_prep", "launch", "configs", "docs", "benchmarks"} <= tests.keys()
    for folder, command in tests.items():
        assert (ROOT / folder).exists(), folder
        launcher, *words = command.split()
        paths = [word for word in words if word.startswith("tests/")]
        assert paths if launcher == "pytest" else launcher == "make", command
        assert all((ROOT / path).exists() for path in paths), command


@each_page
def test_files_that_a_page_names_exist(page):
    known = {path.name for folder in ("gcvit", "data_prep", "launch", "benchmarks", "docs") for path in
             (ROOT / folder).rglob("*")} | {path.name for path in ROOT.iterdir()}  # fmt: skip
    for name in re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|sh|sbatch|md))`", page.read_text()):
        assert (ROOT / name).is_file() or name in known or name.startswith("runs/"), name


# ---- messages ----------------------------------------------------------------------------------------------------


def find_texts() -> list[str]:
    """Every text in the code, with "…" where a value comes in."""
    texts = []
    paths = [path for folder in ("gcvit", "data_prep", "launch") for path in (ROOT / folder).rglob("*.py")]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    scripts = [path.read_text() for path in (ROOT / "launch").glob("*.sh")]
    return [*texts, *(re.sub(r"\$\(\(.*?\)\)|\$\{?\w+\}?", "…", text) for text in scripts)]


def find_messages(page: str) -> list[str]:
    """The quoted messages at the beginning of a list's items."""
    return re.findall(r"^- `([^`]+)`", page, flags=re.MULTILINE)


TEXTS = find_texts()


def is_said(message: str) -> bool:
    """As a whole, or, where a value at its end is a sentence of its own, up to there."""
    return any(message in text or message.removesuffix(" …") in text for text in TEXTS)


@pytest.mark.parametrize("message", find_messages(read_page("troubleshooting")))
def test_the_code_says_what_troubleshooting_quotes(message):
    assert is_said(message)


def test_messages_are_found_and_others_are_not():
    assert len(find_messages(read_page("troubleshooting"))) > 50
    assert not is_said("the cat has sat down on the keyboard")
    assert not is_said("the checkpoint has another sead")


# ---- the figure --------------------------------------------------------------------------------------------------


def find_drawn(svg: str) -> list[str]:
    """The texts of a figure: matplotlib names each in a comment beside its letters."""
    return re.findall(r"<!-- (.*?) -->", svg)


def test_the_figure_is_what_the_model_draws(tmp_path, monkeypatch):
    """Every text in it, which is where its numbers are: lines may fall otherwise with another matplotlib."""
    pytest.importorskip("matplotlib")
    architecture = importlib.import_module("docs.architecture")
    monkeypatch.setattr(sys, "argv", ["architecture", "--out", str(tmp_path / "tiny.svg")])
    architecture.main()
    drawn, kept = (path.read_text() for path in (tmp_path / "tiny.svg", architecture.PICTURE))
    ElementTree.fromstring(kept)
    assert find_drawn(drawn) == find_drawn(kept), "the model has changed: python -m docs.architecture"
    # What the model's own tests pin of this variant.
    blocks = {"3 blocks: 2 local, 1 global", "19 blocks: 10 local, 9 global"}
    assert blocks | {"14 × 14 × 256", "one window, 8 heads", "poolings by stage: 3, 2, 0, 0"} <= set(find_drawn(kept))


def test_the_figure_follows_the_model():
    pytest.importorskip("matplotlib")
    architecture = importlib.import_module("docs.architecture")
    changes = {"img_size": 160, "mlp_ratio": 4.0, "layer_scale": 1e-5, "depths": (2, 3, 2, 2)}
    with torch.device("meta"):
        model = create_model("gc_vit_xxtiny", num_classes=7, **changes)
    texts = {text.get_text() for text in architecture.draw(model, "mine").axes[0].texts}
    assert {"40 × 40 × 64", "64 windows of 5 × 5, 2 heads", "3 blocks: 2 local, 1 global", "7"} <= texts
    assert {"MLP, 512 wide", "layer scale"} <= texts
