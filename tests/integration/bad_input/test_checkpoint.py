"""Weights and checkpoints that do not fit, and run folders that are taken: refused, and nothing is touched."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import train
from gcvit.checkpoint.store import open_checkpoint, read_tensors
from gcvit.model import create_model, weights
from tests.helpers.launching import ROOT, environment, python, run, torchrun
from tests.integration.bad_input.refusals import CONFIG, SHORT, both, expect_line, hashes, refusal

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


@pytest.mark.dist
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


# ---- the disk ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_twice(images, tmp_path_factory) -> Path:
    """A run with a checkpoint after each of its two steps."""
    runs = tmp_path_factory.mktemp("runs")
    words = ["--config", CONFIG, "--data_dir", images, "--tag", "old", f"output_dir={runs}"]
    done = python("train.py", *words, *SHORT, "trainer.save_every=1 step")
    assert done.returncode == 0, done.stderr
    return runs / "old"


def go_on(run_dir: Path, images: Path) -> list[object]:
    words = ["--config", CONFIG, "--data_dir", images, "--tag", run_dir.name, f"output_dir={run_dir.parent}"]
    return [*words, *SHORT, "trainer.save_every=1 step"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


CORRUPTIONS = [
    ("rank_00000.safetensors", flip),
    ("rank_00000.safetensors", Path.unlink),
    ("state.json", flip),
    ("state.json", Path.unlink),
]


@pytest.mark.parametrize(("file", "corruption"), CORRUPTIONS)
def test_auto_alone_passes_over_a_corrupt_checkpoint(
    file, corruption, saved_twice, images, tmp_path, monkeypatch, capsys
):
    run_dir = tmp_path / "old"
    shutil.copytree(saved_twice, run_dir)
    newest = run_dir / "checkpoints/step_00000002"
    corruption(newest / file)
    before = hashes(run_dir)
    if (newest / "state.json").exists():
        words = go_on(tmp_path / "new", images)
        message = refusal(train.main, monkeypatch, *words, "--resume", newest)
        assert f"corrupt checkpoint: {newest / file}" in message
        assert hashes(run_dir) == before

    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, go_on(run_dir, images))])
    train.main()
    said = capsys.readouterr().err
    assert f"WARNING: corrupt checkpoint: {newest / file}" in said
    assert "from step 1\n" in said
    aside = newest.with_name("step_00000002.corrupt")
    assert str(aside) in said
    corrupt = {name.replace(str(newest), str(aside)): digest for name, digest in before.items() if str(newest) in name}
    assert hashes(aside) == corrupt, "what is corrupt is the user's to look at"
    again, first = open_checkpoint(newest), open_checkpoint(saved_twice / "checkpoints/step_00000002")
    assert again.state == first.state
    for kind in ("model", "exp_avg", "exp_avg_sq", "ema"):
        tensors = read_tensors(first, kind)
        for name, tensor in read_tensors(again, kind).items():
            assert torch.equal(tensor, tensors[name]), name


def test_nothing_is_touched_where_no_checkpoint_is_sound(saved_twice, images, tmp_path, monkeypatch):
    run_dir = tmp_path / "old"
    shutil.copytree(saved_twice, run_dir)
    for step in (1, 2):
        flip(run_dir / f"checkpoints/step_0000000{step}/rank_00000.safetensors")
    before = hashes(run_dir)
    message = refusal(train.main, monkeypatch, *go_on(run_dir, images))
    assert f"corrupt checkpoint: {run_dir / 'checkpoints/step_00000002/rank_00000.safetensors'}" in message
    assert hashes(run_dir) == before


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_full_disk(num_processes, finished, images, tmp_path):
    """No file may grow beyond 2 MB: the save fails beside the training, and all ranks stop."""
    run_dir = tmp_path / "old"
    shutil.copytree(finished, run_dir)
    before = hashes(run_dir / "checkpoints")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    line += ["train.py", *map(str, go_on(run_dir, images)), "schedule.cosine=4 steps"]
    done = run("bash", "-c", 'ulimit -f 2000; exec "$@"', "bash", *line)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, done.stderr[-3000:]
    assert "cannot write the checkpoint" in errors[0]
    assert str(run_dir / "checkpoints/step_00000003.tmp/rank_") in errors[0]
    assert "File too large" in errors[0]
    assert "--resume auto" in errors[0]
    assert "exitcode  : 2" in done.stderr or "exitcode: 2" in done.stderr, "a restart cannot help"
    assert hashes(run_dir / "checkpoints") == before
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_folder_that_cannot_be_written(images, tmp_path, monkeypatch):
    """Told at the start, not after the first hours."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new/checkpoints").write_text("")
    message = refusal(train.main, monkeypatch, *go_on(tmp_path / "new", images))
    assert f"cannot write the checkpoint: got {tmp_path / 'new/checkpoints'}" in message
    assert not (tmp_path / "new/metrics.jsonl").exists(), "training began"


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
from gcvit.runtime.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
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
            expect_line(done, "in use by a live run", str(finished), str(first.pid), "hint: ")
            assert hashes(finished) == before
        finally:
            first.kill()


def test_what_wants_given_weights_without_them(monkeypatch, images, tmp_path):
    words = ["--config", CONFIG, "--data_dir", images, f"output_dir={tmp_path / 'runs'}", *SHORT]
    message = refusal(train.main, monkeypatch, *words, "optim.frozen_backbone=1 step")
    assert "optim.frozen_backbone" in message
    assert "--init-from" in message
    assert "--init-from" in refusal(train.main, monkeypatch, *words, "--reset-head")
    assert not list((tmp_path / "runs").rglob("step_*"))
