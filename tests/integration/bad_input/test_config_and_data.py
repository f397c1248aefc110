"""What a user can get wrong: one line that begins with "error", exit code 2, no traceback, nothing lost.

Most cases call `main()` in this process, where a `UserError` is what `run_main` prints as that line
(tests/unit/ test_errors.py); some are real processes, to see it end to end.
"""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

import train
from tests.helpers.launching import python, torchrun
from tests.integration.bad_input.refusals import CONFIG, SHORT, both, expect_line, hashes, refusal

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
        ("model.overrides.widht=32", ["unknown config key", "did you mean model.overrides.width?"]),
        ("model.overrides.width=big", ["model.overrides.width", "integer"]),
        ("model.img_size=31", ["model.img_size", "greater than or equal to 32"]),
        ("optim.frozen_backbone=99 epochs", ["optim.frozen_backbone", "as long as the run"]),
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


def test_a_missing_or_empty_data_directory(monkeypatch, finished, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, word in (("absent", "missing"), ("empty", "empty"), ("file", "a file")):
        for message in both(monkeypatch, tmp_path / name, finished, tmp_path):
            assert str(tmp_path / name) in message
            assert word in message
            assert "hint: check --data_dir" in message


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
    ("corruption", "words"),
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
def test_corrupt_shards(corruption, words, monkeypatch, shards, finished, tmp_path):
    shutil.copytree(shards, tmp_path / "data")
    for split in ("train", "val"):
        corruption(tmp_path / "data" / split)
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
        assert "expected: .tar" in message


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


@pytest.mark.dist
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
    assert "too many samples are corrupt" in errors[0]
    assert "bee/0.jpg" in errors[0]


@pytest.mark.dist
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
