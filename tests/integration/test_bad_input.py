"""What a user can get wrong: one line that begins with "error", exit code 2, no traceback, nothing lost.

Most cases call `main()` in this process, where a `UserError` is what `run_main` prints as that line
(tests/unit/ test_errors.py); some are real processes, to see it end to end.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from gcvit.errors import UserError
from gcvit.model import create_model, weights
from tests.integration.launching import ROOT, environment, python, torchrun

CONFIG = Path(__file__).with_name("golden.yaml")
SHORT = ["schedule.cosine=2 steps", "schedule.warmup=0 steps", "global_batch_size=8"]
CLASSES = ("ape", "bee", "cat", "dog")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, per_class in (("train", 4), ("val", 1)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 256, (36, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def shards(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    done = python("-m", "data_prep.shard", images, out, "--shard-size", 8, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    """A finished run, whose files no mistake may touch."""
    runs = tmp_path_factory.mktemp("runs")
    words = ["--config", CONFIG, "--data_dir", images, "--tag", "old", f"output_dir={runs}", *SHORT]
    done = python("train.py", *words)
    assert done.returncode == 0, done.stderr
    return runs / "old"


def hashes(*folders: Path) -> dict[str, str]:
    """Every file below the folders. The lock is left out: whoever holds it signs it."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refusal(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    """The error that `main` ends with; RANK and the like are this process's own."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
    with pytest.raises(UserError) as caught:
        main()
    message = " ".join(str(caught.value).split())
    assert "; " in message or ": " in message
    return message


def expect_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in errors[0]


# ---- the config ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "optim.weight_deacy=1",
            ["unknown config key", "optim.weight_deacy", "did you mean optim.weight_decay?"],
        ),
        ("trainer.log_every=often", ["trainer.log_every", "'often'", '"500 steps"']),
        ('optim.lr="5e-6"', ["optim.lr", "'5e-6'", "number"]),
        ("zero.stage=2", ["zero.* has no effect with engine=ddp"]),
        (
            "augment.rand_augment=rand-m9-mstd0.5-inc1 augment.color_jitter=0.4",
            ["color_jitter has no effect"],
        ),
        ("model.name=gc_vit_tinyy", ["unknown model", "gc_vit_tiny"]),
        ("model.overrides.widht=32", ["unknown override", "width"]),
        ("model.img_size=40", ["img_size", "multiples of 32"]),
        ("augment.rand_augment=rand-x9", ["augment.rand_augment", "rand-x9"]),
        ("schedule.warmup=9 steps", ["schedule.warmup is longer"]),
        ("ema.half_life=0 steps", ["ema.half_life"]),
        ("model.overrides.num_classes=4", ["num_classes"]),
    ],
)
def test_a_mistake_in_the_config_leaves_the_run_as_it_was(override, words, images, finished, monkeypatch):
    before = hashes(finished.parent, images)
    line = ["--config", CONFIG, "--data_dir", images, "--tag", "old", f"output_dir={finished.parent}", *SHORT]
    extra = override.split() if override.count("=") > 1 else [override]
    message = refusal(train.main, monkeypatch, *line, *extra)
    for word in words:
        assert word in message
    assert hashes(finished.parent, images) == before


def test_a_misspelt_key_is_told_end_to_end(images, tmp_path):
    done = python("train.py", "--config", CONFIG, "--data_dir", images, f"output_dir={tmp_path}", "optim.lrr=5e-6")
    expect_line(done, "unknown config key", "optim.lrr", "did you mean optim.lr?")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---- the data ------------------------------------------------------------------------------------


def both(monkeypatch: pytest.MonkeyPatch, data: Path | str, finished: Path, tmp_path: Path) -> list[str]:
    """What train.py and evaluate.py say of a data directory; neither writes anything."""
    before = hashes(finished, *([Path(data)] if Path(data).is_dir() else []))
    words = ["--config", CONFIG, "--data_dir", data, f"output_dir={tmp_path / 'new'}", *SHORT]
    messages = [
        refusal(train.main, monkeypatch, *words),
        refusal(evaluate.main, monkeypatch, finished, "--data_dir", data),
    ]
    assert not list((tmp_path / "new").rglob("step_*")), "a checkpoint of nothing"
    assert hashes(finished, *([Path(data)] if Path(data).is_dir() else [])) == before
    return messages


def test_a_missing_or_empty_data_directory(monkeypatch, finished, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, word in (("absent", "missing"), ("empty", "empty"), ("file", "a file")):
        for message in both(monkeypatch, tmp_path / name, finished, tmp_path):
            assert str(tmp_path / name) in message
            assert word in message
            assert "cure: check --data_dir" in message


def test_no_data_directory(monkeypatch, tmp_path):
    message = refusal(train.main, monkeypatch, "--config", CONFIG, f"output_dir={tmp_path}")
    assert "--data_dir" in message


def test_a_class_folder_without_images(monkeypatch, images, finished, tmp_path):
    shutil.copytree(images, tmp_path / "data")
    for split in ("train", "val"):
        for path in (tmp_path / "data" / split / "cat").iterdir():
            path.rename(path.with_suffix(".txt"))
    for message in both(monkeypatch, tmp_path / "data", finished, tmp_path):
        assert "a class folder holds no images" in message
        assert "cat" in message


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lengthen(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(bytes(512))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda split: (split / "manifest.json").unlink(), ["shards without a manifest"]),
        (lambda split: truncate(next(split.glob("*.tar"))), [".tar", "truncated"]),
        (lambda split: next(split.glob("*.tar")).unlink(), [".tar", "No such file"]),
        (lambda split: lengthen(next(split.glob("*.tar"))), [".tar", "grown"]),
        (lambda split: (split / "manifest.json").write_text("{}"), ["manifest.json"]),
        (lambda split: truncate(split / "manifest.json"), ["manifest.json"]),
        (lambda split: (split / "manifest.label.npy").unlink(), ["manifest.label.npy"]),
    ],
)
def test_damaged_shards(damage, words, monkeypatch, shards, finished, tmp_path):
    shutil.copytree(shards, tmp_path / "data")
    for split in ("train", "val"):
        damage(tmp_path / "data" / split)
    for message in both(monkeypatch, tmp_path / "data", finished, tmp_path):
        assert str(tmp_path / "data") in message
        for word in words:
            assert word in message


def test_compressed_shards(monkeypatch, shards, finished, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / f"{split}-000000.tar.gz").write_bytes(b"\x1f\x8b")
    for message in both(monkeypatch, tmp_path / "data", finished, tmp_path):
        assert ".tar.gz" in message
        assert "allowed: .tar" in message


def test_a_manifest_that_was_edited(monkeypatch, shards, finished, tmp_path):
    shutil.copytree(shards, tmp_path / "data")
    for split in ("train", "val"):
        path = tmp_path / "data" / split / "manifest.json"
        content = json.loads(path.read_text())
        content["classes"] = content["classes"][::-1]
        path.write_text(json.dumps(content))
    for message in both(monkeypatch, tmp_path / "data", finished, tmp_path):
        assert "manifest" in message


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_file_that_is_no_image(kind, monkeypatch, images, shards, finished, tmp_path):
    """In a tar: other bytes in the place of an image, of the same length; the checksum finds it before
    Pillow."""
    shutil.copytree(images if kind == "folder" else shards, tmp_path / "data")
    for split in ("train", "val"):
        if kind == "folder":
            (tmp_path / "data" / split / "bee" / "0.jpg").write_text("this is no image")
        else:
            path = next((tmp_path / "data" / split).glob("*.tar"))
            content = bytearray(path.read_bytes())
            at = content.index(b"\xff\xd8\xff")
            content[at : at + 20] = b"this is no image at "
            path.write_bytes(content)
    for message in both(monkeypatch, tmp_path / "data", finished, tmp_path):
        assert ".jpg" in message


def test_a_sample_that_is_no_image_ends_all_ranks_and_loaders(images, tmp_path):
    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data/train/bee/0.jpg").write_text("this is no image")
    words = ["--config", CONFIG, "--data_dir", tmp_path / "data", f"output_dir={tmp_path}", *SHORT]
    begin = time.monotonic()
    done = torchrun(2, "train.py", *words, "data.num_workers=1", timeout=120)
    assert time.monotonic() - begin < 100
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, done.stderr
    assert "bee/0.jpg" in errors[0]


def test_more_processes_than_samples(images, tmp_path):
    """Of val, which has a single sample: told at the start, not at the first evaluation."""
    for split in ("train", "val"):
        (tmp_path / "data" / split / "only").mkdir(parents=True)
    for i in range(8):
        shutil.copyfile(images / "train/ape/0.jpg", tmp_path / f"data/train/only/{i}.jpg")
    shutil.copyfile(images / "val/ape/0.jpg", tmp_path / "data/val/only/0.jpg")
    words = ["--config", CONFIG, "--data_dir", tmp_path / "data", f"output_dir={tmp_path / 'runs'}", *SHORT]
    done = torchrun(2, "train.py", *words, "model.num_classes=1", timeout=120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, done.stderr
    assert "more processes than samples" in errors[0]
    assert not list((tmp_path / "runs").rglob("metrics.jsonl")), "training began"


# ---- the model -----------------------------------------------------------------------------------


def test_another_class_count(monkeypatch, images, finished, tmp_path):
    shutil.copytree(images, tmp_path / "data")
    for split in ("train", "val"):
        shutil.copytree(tmp_path / "data" / split / "cat", tmp_path / "data" / split / "eel")
    for message in both(monkeypatch, tmp_path / "data", finished, tmp_path):
        assert "classes" in message
        assert "5" in message
        assert "4" in message


def test_a_file_with_another_class_count(monkeypatch, images, tmp_path):
    path = tmp_path / "weights.pth.tar"
    state = weights.to_official_state(create_model("gc_vit_xxtiny", num_classes=7).state_dict())
    torch.save({"state_dict": state}, path)
    words = ["--model", "gc_vit_xxtiny", "--checkpoint", path, "--data_dir", images]
    message = refusal(evaluate.main, monkeypatch, *words)
    for word in (str(path), "classes", "7", "4"):
        assert word in message


def test_a_file_of_another_model(monkeypatch, images, tmp_path):
    (tmp_path / "text.pth").write_text("text")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3)}}, tmp_path / "resnet.pth")
    for name in ("text.pth", "resnet.pth", "absent.pth"):
        published = ["--model", "gc_vit_xxtiny", "--checkpoint", tmp_path / name, "--data_dir", images]
        assert str(tmp_path / name) in refusal(evaluate.main, monkeypatch, *published)
        words = ["--config", CONFIG, "--data_dir", images, f"output_dir={tmp_path / 'runs'}", *SHORT]
        assert str(tmp_path / name) in refusal(train.main, monkeypatch, *words, "--init-from", tmp_path / name)
    assert not list((tmp_path / "runs").rglob("step_*"))


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "gc_vit_xxtinyy", "--checkpoint", "x.pth"],
        ["--model", "gc_vit_xxtiny"],
        ["--checkpoint", "x.pth"],
        [],
        ["absent"],
    ],
)
def test_nothing_to_evaluate(words, monkeypatch, images):
    refusal(evaluate.main, monkeypatch, *words, "--data_dir", images)


@pytest.mark.parametrize("batch_size", ["0", "-1"])
def test_a_batch_of_nothing(batch_size, monkeypatch, images, finished):
    words = ["--data_dir", images, "--batch-size", batch_size]
    assert "--batch-size" in refusal(evaluate.main, monkeypatch, finished, *words)


def test_a_checkpoint_of_another_model(monkeypatch, images, finished):
    before = hashes(finished)
    words = [
        "--config",
        CONFIG,
        "--data_dir",
        images,
        "--tag",
        "old",
        f"output_dir={finished.parent}",
        *SHORT,
    ]
    # The last has all its tensors in the checkpoint, which has more.
    for override in ("width=32", "depths=[2, 2, 4, 2]", "layer_scale=null"):
        message = refusal(train.main, monkeypatch, *words, f"model.overrides.{override}")
        assert "checkpoint of another model" in message
        assert str(finished) in message
    assert hashes(finished) == before


def test_a_checkpoint_of_another_model_is_told_by_all_ranks(images, finished, tmp_path):
    """Under ZeRO the part that differs, here the last stage's heads, may lie on the last rank alone."""
    before = hashes(finished)
    step = sorted((finished / "checkpoints").iterdir())[-1]
    words = ["--config", CONFIG, "--data_dir", images, f"output_dir={tmp_path}", "--resume", step, *SHORT]
    done = torchrun(
        2,
        "train.py",
        *words,
        "engine=zero",
        "zero.stage=2",
        "model.overrides.num_heads=[1, 2, 4, 16]",
        timeout=120,
    )
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, done.stderr[-3000:]
    assert "checkpoint of another model" in errors[0]
    assert hashes(finished) == before


# ---- the run's folder ----------------------------------------------------------------------------


def test_a_new_run_over_an_old_one(monkeypatch, images, finished):
    before = hashes(finished)
    words = [
        "--config",
        CONFIG,
        "--data_dir",
        images,
        "--tag",
        "old",
        f"output_dir={finished.parent}",
        *SHORT,
    ]
    message = refusal(train.main, monkeypatch, *words, "--resume", "none")
    assert "the run folder holds a run already" in message
    assert hashes(finished) == before


def test_other_data_than_the_checkpoints(monkeypatch, images, shards, finished):
    before = hashes(finished)
    words = [
        "--config",
        CONFIG,
        "--data_dir",
        shards,
        "--tag",
        "old",
        f"output_dir={finished.parent}",
        *SHORT,
    ]
    assert "other data" in refusal(train.main, monkeypatch, *words)
    assert hashes(finished) == before


HOLD = """
import sys, time
from pathlib import Path
from gcvit.runfolder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(200)
"""


def test_a_run_folder_in_use_by_a_live_run(images, finished):
    before = hashes(finished)
    command = [sys.executable, "-c", HOLD, str(finished)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as first:
        try:
            assert isinstance(first.stdout, io.TextIOBase)
            assert first.stdout.readline() == "held\n"
            words = [
                "--config",
                CONFIG,
                "--data_dir",
                images,
                "--tag",
                "old",
                f"output_dir={finished.parent}",
            ]
            done = python("train.py", *words, *SHORT)
            expect_line(done, "in use by a live run", str(finished), str(first.pid), "cure: ")
            assert hashes(finished) == before
        finally:
            first.kill()
