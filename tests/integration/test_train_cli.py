"""train.py and evaluate.py as a user starts them: one plain process, torchrun, the deepspeed launcher."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gcvit.checkpoint.store import open_checkpoint, read_tensors
from gcvit.checkpoint.weights_source import find_candidate, find_file, load
from gcvit.config.load import load_config
from gcvit.data.source import open_source
from gcvit.evaluation.evaluator import evaluate
from gcvit.model import create_model, weights
from gcvit.monitoring.schema import TIMED_KEYS
from gcvit.runtime.distributed import join_world
from tests.helpers.launching import python, run, succeed, torchrun

CONFIG = Path(__file__).parents[1] / "helpers/golden.yaml"
SHORT = ["schedule.cosine=10 steps", "trainer.eval_every=5 steps", "trainer.save_every=5 steps"]
SHARES = {"loss", "ece"}
COUNTS = {"top1", "top5", "num_samples", "correct_top1", "correct_top5", "num_skipped"}
KEYS = {"name", "weights", *SHARES, *COUNTS}
NUM_VAL = 31  # divided by none of 2, 3 and 5


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """train/ and val/ of four classes of noisy colours; classes of uneven size."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, num_images in (("train", 90), ("val", NUM_VAL)):
        for i in range(num_images):
            label = i % 7 % 4
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 120, (36, 36, 3)) + np.array([40 * label, 120 - 40 * label, 60])
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


def arguments(images: Path, runs: Path, tag: str, *others: str) -> list[str]:
    return [
        "train.py",
        "--config",
        str(CONFIG),
        "--data_dir",
        str(images),
        "--tag",
        tag,
        f"output_dir={runs}",
        *SHORT,
        *others,
    ]


def rows(run_dir: Path, kind: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def last_line(done: CompletedProcess[str]) -> dict:
    return json.loads(succeed(done).stdout.splitlines()[-1])


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> Path:
    """A run by one plain process, with the flags of the published command."""
    runs = tmp_path_factory.mktemp("runs")
    others = ["--batch-size", "16", "--model-ema", "--resume", "none", "optim.lr=1e-4"]
    succeed(python(*arguments(images, runs, "plain", *others)))
    return runs / "plain"


def test_a_plain_process_leaves_a_complete_run(trained):
    assert [row["step"] for row in rows(trained)] == list(range(1, 11))
    assert [row["step"] for row in rows(trained, "val/ema")] == [5, 10]
    assert rows(trained, "val/ema")[0]["num_samples"] == NUM_VAL
    config, _ = load_config(trained / "config.yaml")
    assert (config.tag, config.trainer.micro_batch_size, config.optim.lr) == ("plain", 16, 1e-4)
    assert list(trained.glob("events.out.tfevents.*"))
    found = open_checkpoint(trained / "checkpoints" / "step_00000010")
    assert (found.state.step, found.state.samples, found.state.counters.updates, found.state.ema_updates) == (
        10,
        320,
        10,
        10,
    )
    best = max(rows(trained, "val/ema"), key=lambda row: (row["top1"], -row["step"]))
    assert (found.state.best_step, found.state.best_top1) == (best["step"], best["top1"])


@pytest.mark.dist
def test_torchrun_trains_as_one_process_does(images, trained):
    others = ["engine=fsdp", "optim.lr=1e-4", "data.num_workers=1"]
    done = succeed(torchrun(2, *arguments(images, trained.parent, "torchrun", *others)))
    assert "Traceback" not in done.stderr
    losses = [[row["loss"] for row in rows(trained.parent / tag)] for tag in ("plain", "torchrun")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.dist
def test_the_deepspeed_launcher_trains_as_one_process_does(images, trained):
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_gpus", 2, "--master_port", 29777]
    others = ["engine=zero", "zero.stage=2", "optim.lr=1e-4"]
    # The launcher starts its children with the python that it finds first.
    path = f"{launcher.parent}:/usr/bin:/bin"
    succeed(run(*command, *arguments(images, trained.parent, "launcher", *others), PATH=path))
    losses = [[row["loss"] for row in rows(trained.parent / tag)] for tag in ("plain", "launcher")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert open_checkpoint(trained.parent / "launcher/checkpoints/step_00000010").info["world_size"] == 2


def test_a_finished_run_is_left_alone(images, trained):
    before = hashes(trained)
    others = ["--batch-size", "16", "--model-ema", "--resume", "auto", "optim.lr=1e-4"]
    succeed(python(*arguments(images, trained.parent, "plain", *others)))
    after = hashes(trained)
    # The lock is signed anew, and TensorBoard begins a file at each start; all else is as it was.
    kept = {name: value for name, value in before.items() if name != "lock"}
    assert {name: after.get(name) for name in kept} == kept
    assert all("tfevents" in name for name in after.keys() - before.keys())


def test_a_shorter_schedule_than_what_is_done_is_no_traceback(images, trained):
    before = hashes(trained / "checkpoints")
    others = ["--batch-size", "16", "--model-ema", "optim.lr=1e-4", "schedule.cosine=5 steps"]
    done = python(*arguments(images, trained.parent, "plain", *others))
    assert done.returncode in (0, 2)
    assert "Traceback" not in done.stderr
    assert hashes(trained / "checkpoints") == before


def test_resume_of_a_path_goes_on_in_another_run(images, trained):
    """From the middle of `trained`: its second half again, to the bit, in a folder of its own."""
    before = hashes(trained)
    middle = trained / "checkpoints" / "step_00000005"
    others = ["--batch-size", "16", "--model-ema", "--resume", str(middle), "optim.lr=1e-4"]
    done = succeed(python(*arguments(images, trained.parent, "branch", *others)))
    assert "from step 5" in done.stderr
    branch = trained.parent / "branch"
    for kind in ("train", "val/ema"):
        wanted = [row for row in rows(trained, kind) if row["step"] > 5]
        found = rows(branch, kind)
        for row in [*wanted, *found]:
            for key in TIMED_KEYS:
                row.pop(key, None)
        assert found == wanted
    assert [path.name for path in (branch / "checkpoints").iterdir()] == ["step_00000010"]
    ends = [open_checkpoint(run_dir / "checkpoints" / "step_00000010") for run_dir in (trained, branch)]
    assert ends[1].state.samples == 320
    for kind in ("model", "exp_avg", "ema"):
        whole, resumed = (read_tensors(end, kind) for end in ends)
        assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert hashes(trained) == before


def test_init_from_takes_the_weights_alone(images, trained, tmp_path):
    """From a file in the official layout; the class count is that of the config, the schedule begins at 0."""
    config, _ = load_config(CONFIG)
    model = create_model(
        "gc_vit_xxtiny",
        num_classes=4,
        img_size=32,
        drop_path_rate=0.0,
        **config.model.overrides.model_dump(exclude_none=True),
    )
    model.init_weights(seed=99)
    path = tmp_path / "weights.pth.tar"
    torch.save({"state_dict": weights.to_official_state(model.state_dict())}, path)
    others = [
        "--init-from",
        str(path),
        "optim.lr=1e-12",
        "optim.warmup_lr=0",
        "optim.min_lr=0",
        "optim.weight_decay=0",
    ]
    succeed(python(*arguments(images, tmp_path, "init", *others)))
    found = open_checkpoint(tmp_path / "init/checkpoints/step_00000010")
    assert found.state.step == 10
    assert found.state.initial_weights == "those of weights.pth.tar"  # for the model card
    for kind in ("model", "ema"):
        stored = read_tensors(found, kind)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(stored[name], parameter.detach(), rtol=0, atol=1e-9)


@pytest.mark.dist
def test_fine_tuning_of_weights_with_other_classes_and_windows(images, tmp_path):
    """Weights of 64 pixels and seven classes, in timm's layout, sharded over two processes: windows follow, the head
    is new and at first moves alone."""
    shape = load_config(CONFIG)[0].model.overrides.model_dump(exclude_none=True) | {"windows": (8, 4, 4, 2)}
    given = create_model("gc_vit_xxtiny", num_classes=7, img_size=64, **shape)
    given.init_weights(seed=99)
    path = tmp_path / "weights.safetensors"
    save_file({n: t.contiguous() for n, t in weights.to_timm_state(given.state_dict()).items()}, path)
    others = ["--init-from", str(path), "optim.frozen_backbone=5 steps", "optim.layer_decay=0.9", "optim.lr=1e-3"]
    command = arguments(images, tmp_path, "fine", *others, "engine=fsdp", "ema=null")
    refused = python(*command)
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)
    assert "another number of classes" in refused.stderr
    done = succeed(torchrun(2, *command, "--reset-head"))
    for words in ("timm layout", "bias tables resampled 2 -> 1 and 4 -> 2 and 8 -> 4", "without its head"):
        assert words in done.stdout + done.stderr

    with torch.device("meta"):
        model = create_model("gc_vit_xxtiny", num_classes=4, img_size=32, **shape | {"windows": (4, 2, 2, 1)})
    expected, _ = weights.read_fitting(model, path, reset_head=True, resample=True)
    half, whole = (
        read_tensors(open_checkpoint(tmp_path / f"fine/checkpoints/step_{step:08d}"), "model") for step in (5, 10)
    )
    assert expected.keys() | {"head.fc.weight", "head.fc.bias"} == half.keys()
    assert all(torch.equal(half[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(half["head.fc.weight"], model.initial_value("head.fc.weight", seed=3))
    assert sum(not torch.equal(whole[name], half[name]) for name in half) > 0.8 * len(half)


# ---- evaluation ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(images, trained) -> dict:
    """The evaluation of `trained` by one plain process."""
    done = python("evaluate.py", trained, "--data_dir", images, "--batch-size", 7)
    result = last_line(done)
    assert len(done.stdout.splitlines()) == 1
    return result


def test_the_evaluation_is_that_of_a_plain_loop(images, trained, alone):
    """With PIL and topk, image by image; `golden.yaml` keeps the whole image, so nothing is resized but the
    side."""
    assert alone.keys() == KEYS
    candidate = find_candidate(str(trained))
    data = candidate.data
    with join_world() as world:
        model = load(candidate, candidate.read(world), 32)
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    correct, loss = np.zeros(2, dtype=int), 0.0
    for path in sorted((images / "val").rglob("*.png")):
        label = int(path.parent.name.removeprefix("class_"))
        image = Image.open(path).resize((32, 32), Image.Resampling.BICUBIC)
        x = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            logits = model(x[None])
        found = logits.topk(4).indices[0] == label
        correct += [bool(found[0]), bool(found.any())]
        loss += torch.nn.functional.cross_entropy(logits, torch.tensor([label])).item() / NUM_VAL
    assert (alone["num_samples"], alone["correct_top1"]) == (NUM_VAL, correct[0])
    assert alone["top1"] == pytest.approx(100 * correct[0] / NUM_VAL)
    assert alone["top5"] == 100.0
    assert alone["loss"] == pytest.approx(loss, rel=1e-4)
    assert alone["top1"] == pytest.approx(open_checkpoint(trained / "checkpoints/step_00000010").state.best_top1)


@pytest.mark.dist
@pytest.mark.parametrize("num_processes", [2, 5])  # three: test_evaluate_cli.py
def test_counts_are_the_same_on_any_number_of_processes(images, trained, alone, num_processes):
    evaluation = ["evaluate.py", trained, "--data_dir", images, "--batch-size", 4]
    many = last_line(torchrun(num_processes, *evaluation))
    assert many.keys() == KEYS
    for key in KEYS - SHARES:
        assert many[key] == alone[key]
    for key in SHARES:
        assert many[key] == pytest.approx(alone[key], rel=1e-6)


def test_the_published_form_names_a_model_and_a_file(images, tmp_path):
    """An official checkpoint of a published variant; its card, and no run, says how images are prepared."""
    for i in range(4):
        (tmp_path / f"data/val/class_{i}").mkdir(parents=True)
        shutil.copy(sorted((images / f"val/class_{i}").iterdir())[0], tmp_path / f"data/val/class_{i}/0.png")
    model = create_model("gc_vit_xxtiny", num_classes=4)
    path = tmp_path / "gcvit_xxtiny.pth.tar"
    torch.save({"state_dict": weights.to_official_state(model.state_dict()), "epoch": 3}, path)
    published = [
        "--model",
        "gc_vit_xxtiny",
        "--checkpoint",
        path,
        "--data_dir",
        tmp_path / "data",
        "--batch-size",
        3,
    ]
    result = last_line(python("evaluate.py", *published))
    assert result.keys() == KEYS
    assert result["num_samples"] == 4
    assert result["top5"] == 100.0

    # At another size it is the same weights with other bias tables.
    candidate = find_file("gc_vit_xxtiny", str(path), resample=True)
    result = last_line(python("evaluate.py", *published, "--img-size", 64))
    source = open_source(str(tmp_path / "data"), "val", None, None)
    with join_world() as world:
        smaller = load(candidate, candidate.read(world), 64)
        expected = evaluate(smaller, source, candidate.data, world, img_size=64, batch_size=2)
    assert result["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert 0 < result["loss"] < 10
