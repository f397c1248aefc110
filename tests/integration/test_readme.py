"""The README's commands run, top to bottom as a newcomer would type them, and then those of docs/model.md.

Commands that need GPUs are parsed as they stand, and most run too, with a tiny model on two CPU processes.
"""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from deepspeed.launcher.runner import parse_args as parse_deepspeed
from PIL import Image
from torch.distributed.run import get_args_parser as torchrun_parser

import evaluate
import train
from gcvit.config.load import load_config
from gcvit.errors import UserError
from gcvit.model import create_model, weights
from tests.helpers.command_lines import find_blocks, find_commands
from tests.helpers.launching import ROOT, environment

pytestmark = pytest.mark.docs

README = (ROOT / "README.md").read_text()
MODEL_PAGE = (ROOT / "docs/model.md").read_text()
MAX_LINES = 150
# What this file cannot run inside itself, and where it is run.
COVERED = {
    "make demo": "test_the_demo below, slow",
    "make demo ENGINE=zero": "test_the_demo below, slow",
    "make demo ENGINE=ddp": "test_the_demo below, slow",
    "make test": "it runs this file",
    "make install": "it made what runs this file",
}
# Only parsed here: the first launcher is started by test_train_cli.py, the second waits for other nodes, the third is
# started by slurm/test_jobs.py, and the last fetches weights from a server, as test_pretrained.py does from its own.
ONLY_PARSED = (
    *("deepspeed ", "torchrun --nnodes ", "sbatch "),
    "python train.py --config configs/gc_vit_xxtiny_finetune.yaml",
)
INSTEAD_OF_TRAINING = ("--plan", "--overfit-one-batch")
SMALL = (
    "model.img_size=32 'model.overrides={width: 16, depths: [2, 2, 2, 2], num_heads: [1, 2, 4, 8]}' "
    "global_batch_size=8 schedule.warmup='0 steps' schedule.cosine='2 steps' schedule.cooldown='0 steps' "
    "data.num_workers=0"
)
SCALED_DOWN = {
    "--nproc-per-node 8 train.py": "--nproc-per-node 2 train.py",
    "--nproc-per-node 8 evaluate.py": "--nproc-per-node 1 evaluate.py",
    "--gpus 32": "--gpus 2",
    "--batch-size 64": "--batch-size 10",
    "cat.jpg": "data/flowers/rose/0.jpg",
    " gc_vit_tiny": " gc_vit_xxtiny",
    "source .venv": f"source {sys.prefix}",
}
WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361")
NUM_VAL = 9


COMMANDS = [*find_commands(README), *find_commands(MODEL_PAGE)]
RUN_HERE = [c for c in COMMANDS if c.line not in COVERED and not c.line.startswith(ONLY_PARSED)]
MARKED = [command for command in COMMANDS if command.needs]


# ---- commands ----------------------------------------------------------------------------------------------------


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_archive(path: Path, files: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_imagenet(folder: Path) -> None:
    """The three archives as image-net.org has them, with four classes of four images, and nine to evaluate."""
    folder.mkdir(parents=True)
    of_classes = {}
    for label, wnid in enumerate(WNIDS):
        write_archive(folder / "class.tar", {f"{wnid}_{i}.JPEG": picture(10 * label + i) for i in range(4)})
        of_classes[f"{wnid}.tar"] = (folder / "class.tar").read_bytes()
    (folder / "class.tar").unlink()
    write_archive(folder / "ILSVRC2012_img_train.tar", of_classes)
    val = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": picture(100 + i) for i in range(NUM_VAL)}
    write_archive(folder / "ILSVRC2012_img_val.tar", val)
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    synsets = np.array([(i + 1, wnid, f"fish {i}, fish", "a fish", 0) for i, wnid in enumerate(WNIDS)], dtype=fields)
    scipy.io.savemat(folder / "meta.mat", {"synsets": synsets})
    devkit = {
        "data/meta.mat": (folder / "meta.mat").read_bytes(),
        "data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{i % 4 + 1}\n" for i in range(NUM_VAL)).encode(),
    }
    (folder / "meta.mat").unlink()
    in_folder = {f"ILSVRC2012_devkit_t12/{name}": content for name, content in devkit.items()}
    write_archive(folder / "ILSVRC2012_devkit_t12.tar.gz", in_folder, "w:gz")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder that looks like the repository, with /data as data/ in it."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("train.py", "evaluate.py", "configs"):
        (root / name).symlink_to(ROOT / name)
    write_imagenet(root / "data/imagenet")
    for label, flower in enumerate(("daisy", "rose", "tulip", "lily", "iris")):
        folder = root / "data/flowers" / flower
        folder.mkdir(parents=True)
        for i in range(12):
            (folder / f"{i}.jpg").write_bytes(picture(50 * label + i))
    model = create_model("gc_vit_xxtiny", num_classes=len(WNIDS))
    torch.save({"state_dict": weights.to_official_state(model.state_dict())}, root / "gcvit_1k_xxtiny.pth.tar")
    return root


def scale_down(line: str, checkout: Path) -> str:
    for large, small in SCALED_DOWN.items():
        line = line.replace(large, small)
    if " train.py " in line:
        num_classes = "" if "model.num_classes" in line else f"model.num_classes={len(WNIDS)}"
        line = f"{line} {num_classes} {SMALL}"
    return line.replace("/data/", f"{checkout}/data/")


@pytest.mark.parametrize("command", RUN_HERE, ids=lambda command: command.line[:60])
def test_the_commands_run_in_this_order(command, checkout):
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    on_cpu = environment(PATH=path, CUDA_VISIBLE_DEVICES="")
    line = scale_down(command.line, checkout)
    bash = ["bash", "-euc", line]
    done = subprocess.run(bash, cwd=checkout, env=on_cpu, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr[-4000:]}"
    if " evaluate.py " in line:
        num_val = json.loads(done.stdout.splitlines()[-1])["num_samples"]
        assert num_val == NUM_VAL if "imagenet" in line else 0 < num_val < 30
    if " train.py " in line and not any(word in line for word in INSTEAD_OF_TRAINING):
        check_run_folder(checkout, line)


def check_run_folder(checkout: Path, line: str) -> None:
    """It holds what the guide lists: the names in backquotes that start the list's items."""
    page = (ROOT / "docs/first_run.md").read_text()
    section = page.split("## What a run leaves")[1].split("\n## ")[0]
    names = re.findall(r"^- `([^`]+)`", section, flags=re.MULTILINE)
    assert len(names) == 6
    tag = re.search(r"--tag (\S+)", line) or re.search(r"configs/(\w+)\.yaml", line)
    assert tag is not None
    for name in names:
        assert list((checkout / "runs" / tag[1]).glob(name.replace("_N", "_*"))), name


def parse(line: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have the launcher and `main` read a command as it stands, but for data that is not there: what main says."""
    launcher, *words = shlex.split(line.replace("/data/", f"{nowhere}/"))
    if launcher == "torchrun":
        read = torchrun_parser().parse_args(words)
        words = [read.training_script, *read.training_script_args]
    elif launcher == "deepspeed":
        read = parse_deepspeed(words)
        words = [read.user_script, *read.user_args]
    elif launcher == "sbatch":
        words = ["train.py", "--config", *words[words.index("launch/train.sbatch") + 1 :]]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError) as caught:
        {"train.py": train.main, "evaluate.py": evaluate.main}[words[0]]()
    return str(caught.value)


@pytest.mark.parametrize("command", MARKED, ids=lambda command: command.line[:60])
def test_marked_commands_parse_as_they_stand(command, tmp_path, monkeypatch):
    """The data comes after the config: where only the data is missing, all else was understood."""
    message = parse(command.line, tmp_path / "nowhere", monkeypatch)
    assert f"{tmp_path}/nowhere" in message
    assert "missing" in message
    if command.line.startswith("deepspeed "):
        assert load_config(ROOT / command.line.split("--config ")[1].split()[0])[0].engine == "zero"


@pytest.mark.parametrize(
    "line",
    [
        "torchrun --standalone --nproc-per-gpu 8 train.py --config configs/gc_vit_tiny.yaml --data_dir /data/x",
        "deepspeed --num-gpu 8 train.py --config configs/gc_vit_large_zero.yaml --data_dir /data/x",
        "python evaluate.py runs/x --data /data/x",
        "python train.py --config configs/gc_vit_tiny.yaml --data_dir /data/x --batchsize 8",
    ],
)
def test_a_mistake_in_a_marked_command_is_found(line, tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        parse(line, tmp_path, monkeypatch)


def test_a_misspelt_option_in_a_marked_command_is_found(tmp_path, monkeypatch):
    line = "python train.py --config configs/gc_vit_tiny.yaml --data_dir /data/x optim.lrr=1"
    assert "missing" not in parse(line, tmp_path, monkeypatch)


def test_no_command_is_left_out():
    assert {command.line for command in COMMANDS} >= set(COVERED), "covered, but not in the README"
    assert len(RUN_HERE) >= 10
    assert set(re.findall(r"^```(.*)$", README, flags=re.MULTILINE)) == {"", "bash", "python"}
    for command in RUN_HERE:
        assert not command.line.startswith("make"), f"{command.line}: say in COVERED what runs it"


@pytest.mark.parametrize("block", find_blocks(README, "python"))
def test_python_examples_run(block):
    namespace: dict[str, object] = {}
    exec(block, namespace)
    model = namespace["model"]
    assert isinstance(model, torch.nn.Module)
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 10)


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in COVERED if line.startswith("make demo")])
def test_the_demo(line, tmp_path):
    """In a copy of the repository, so that nobody's own runs/ and data/ are touched."""
    left_out = shutil.ignore_patterns(".venv", ".git", "runs", "data", ".*_cache", "__pycache__")
    shutil.copytree(
        ROOT, tmp_path / "copy", ignore=lambda folder, names: left_out(folder, names) if Path(folder) == ROOT else ()
    )
    (tmp_path / "copy/.venv").symlink_to(ROOT / ".venv")
    done = subprocess.run(
        shlex.split(line),
        cwd=tmp_path / "copy",
        env=environment(PYTHONPATH=""),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["num_samples"] == 360
    assert result["top1"] >= 98


# ---- the text ----------------------------------------------------------------------------------------------------


def test_it_is_short_and_has_both_pictures():
    assert len(README.splitlines()) <= MAX_LINES
    assert re.findall(r"!\[.+\]\((.+)\)", README) == ["docs/architecture.svg", "docs/report.png"]


def test_every_guide_is_in_the_contents():
    guides = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert guides <= set(re.findall(r"\]\(([\w./]+)\)", README))


def test_it_says_where_to_start_reading():
    """Six links into the code, each to a module with a docstring of its own."""
    code = re.findall(r"\]\((gcvit/[\w/]+\.py)\)", README)
    assert len(set(code)) == 6
    for path in code:
        assert (ROOT / path).read_text().startswith('"""'), path


def test_every_file_that_the_text_names_exists():
    named = set(re.findall(r"(?<![\w/.-])(?:[\w.-]+/)*[\w-]+\.(?:py|yaml|toml|txt|md)\b", README))
    assert {"train.py", "configs/gc_vit_large_fsdp.yaml"} <= named
    for name in named:
        assert (ROOT / name).is_file() or list(ROOT.glob(f"docs/{name}")) or list(ROOT.glob(f"tests/*/**/{name}")), name
