"""evaluate.py over ImageNet's test sets, small ones with the real class maps: against plain loops, image by image."""

import csv
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import RealLabelsImagenet

import evaluate
from gcvit.checkpoint import store
from gcvit.checkpoint.store import RunState
from gcvit.checkpoint.weights_source import digest
from gcvit.config.load import load_config
from gcvit.data.source import open_source
from gcvit.evaluation import latency
from gcvit.evaluation.label_sets import read_list
from gcvit.model import GCViT
from gcvit.model.from_config import build_model
from gcvit.parallel.engine import Fragment
from gcvit.runtime.distributed import join_world
from tests.helpers.launching import ROOT, python, succeed, torchrun
from tests.integration.bad_input.refusals import refusal

IMAGENET, A = read_list("imagenet"), read_list("imagenet_a")
STEPS = (4, 8)
NUM_VAL = 22  # divided by neither 3 nor the batch size
SETS = ["imagenet", "real", "v2", "a"]
MEAN, STD = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def save_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """imagenet/val of ImageNet's first validation images, v2 in numbered folders, a as it is unpacked."""
    root = tmp_path_factory.mktemp("sets")
    for i in range(NUM_VAL):
        save_image(root / f"imagenet/val/{IMAGENET[i * 41]}/ILSVRC2012_val_{i + 1:08d}.png", i)
    for label in (0, 2, 10, 100, 999):
        save_image(root / f"v2/{label}/x.png", 100 + label)
    for i in range(7):
        save_image(root / f"a/{A[i * 29]}/x.png", 2000 + i)
    return root


def draw(config, seed: int) -> GCViT:
    """A model with decided opinions, so that no two classes are nearly equal."""
    model = build_model(config.model).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory, sets) -> tuple[Path, dict[tuple[int, str], GCViT]]:
    """A run folder with two checkpoints, as a training on ImageNet leaves it, and their models by step and kind."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config, _ = load_config(ROOT / "tests/helpers/golden.yaml", ["model.num_classes=1000", "data.num_workers=0"])
    models = {(step, kind): draw(config, seed + step) for step in STEPS for seed, kind in enumerate(("model", "ema"))}
    info = {"config": config.model_dump(mode="json"), "data": "", "world_size": 1, "classes": list(IMAGENET)}
    with join_world() as world:
        for step in STEPS:
            tensors = {
                kind: {n: Fragment(p.detach().view(-1), 0, p.shape) for n, p in models[step, kind].named_parameters()}
                for kind in ("model", "ema")
            }
            state = RunState(step=step, samples=32 * step, best_step=STEPS[-1])
            store.save(folder / "checkpoints", state, tensors, info, world)
    return folder, models


def places(sets: Path) -> list[str]:
    folders = {"real": "imagenet"}
    return [word for name in SETS for word in ("--data_dir", f"{name}={sets / folders.get(name, name)}")]


def results(done) -> dict[tuple[str, str], dict]:
    lines = [json.loads(line) for line in succeed(done).stdout.splitlines()]
    return {(line["name"], line["weights"]): line for line in lines}


@pytest.fixture
def call(monkeypatch, capsys) -> Iterator[Callable[..., list[dict]]]:
    """`call(*words)`: the lines of evaluate.py in this process."""

    def call_main(*words: object) -> list[dict]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        evaluate.main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    yield call_main
    torch.use_deterministic_algorithms(False)  # evaluate.py's choice, for its own process


def images_of(folder: Path) -> Iterator[tuple[Path, torch.Tensor]]:
    """By Pillow alone; golden.yaml keeps the whole image."""
    for path in sorted(folder.rglob("*.png")):
        image = Image.open(path)
        scale = 32 / min(image.size)
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
        left = round((image.width - 32) / 2)
        image = image.crop((left, 0, left + 32, 32))
        yield path, (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD


@pytest.fixture(scope="module")
def both(run, sets, tmp_path_factory) -> tuple[dict, Path]:
    """One call over all sets, with both kinds of weights: its lines, and its file of predictions."""
    path = tmp_path_factory.mktemp("predictions") / "all.csv"
    words = ["evaluate.py", run[0], *places(sets), "--batch-size", 4, "--weights", "both", "--predictions", path]
    return results(python(*words)), path


@torch.no_grad()
def test_each_set_is_judged_by_its_own_rules(run, sets, both):
    lines, _ = both
    assert set(lines) == {(name, weights) for name in SETS for weights in ("ema", "model")}
    real = RealLabelsImagenet([f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(50_000)]).real_labels
    for weights in ("ema", "model"):
        model = run[1][STEPS[-1], weights]
        for name in SETS:
            top1, losses = [], []
            for path, image in images_of(sets / {"real": "imagenet"}.get(name, name)):
                logits, folder = model(image[None])[0], path.parent.name
                rights = [int(folder) if name == "v2" else (A if name == "a" else IMAGENET).index(folder)]
                if name == "a":
                    logits = logits[[IMAGENET.index(wnid) for wnid in A]]
                if name == "real" and not (rights := real[f"{path.stem}.JPEG"]):
                    continue
                top1.append(logits.argmax().item() in rights)
                losses.append(-logits.softmax(0)[rights].sum().log().item())
            line = lines[name, weights]
            assert (line["num_samples"], line["correct_top1"]) == (len(top1), sum(top1)), name
            assert line["loss"] == pytest.approx(np.mean(losses), rel=1e-4), name
    assert lines["real", "ema"]["num_samples"] < NUM_VAL


def test_records_hold_what_it_takes_to_repeat_them(run, sets, both):
    folder, models = run
    lines, _ = both
    records = {path.name: json.loads(path.read_text()) for path in (folder / "evaluations").glob("*.json")}
    for (name, weights), line in lines.items():
        record = records[f"{name}-{weights}-step_00000008.json"]
        found = record["result"]
        assert {key: found[key] for key in line if key not in ("name", "weights")} == {
            key: value for key, value in line.items() if key not in ("name", "weights")
        }
        assert record["checkpoint"]["sha256"] == digest(models[8, weights].state_dict())
        assert record["images_per_second"] > 0
        assert len(found["per_class"]) == (200 if name == "a" else 1000)
        for key in ("num", "correct_top1", "correct_top5"):
            total = sum(row[key] for row in found["per_class"])
            assert total == found["num_samples" if key == "num" else key]
        assert sum(row["num"] for row in found["reliability"]) == found["num_samples"]
        data = record["data"]
        source = open_source(data["dir"], data["split"])  # where a reader finds the pictures
        assert (data["sha256"], data["num_samples"]) == (source.digest, source.num_samples)
        assert all(source.name(row["index"]) == row["key"] for row in found["mistakes"])
    with open(folder / "evaluations/results.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) >= 8


def test_predictions_hold_every_sample_once(both):
    lines, path = both
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for (name, weights), line in lines.items():
        own = [row for row in rows if (row["set"], row["weights"]) == (name, weights)]
        assert len(own) == line["num_samples"]
        assert len({row["key"] for row in own}) == len(own)
        if name != "real":
            assert sum(row["label"] == row["top1"] for row in own) == line["correct_top1"]
            top5 = [row["label"] in [row[f"top{k}"] for k in range(1, 6)] for row in own]
            assert sum(top5) == line["correct_top5"]


@pytest.mark.dist
@pytest.mark.parametrize("num_processes", [1, 3])
def test_again_it_is_the_same_and_on_more_processes_too(run, sets, both, tmp_path, num_processes):
    words = ["evaluate.py", run[0], *places(sets), "--batch-size", 4, "--weights", "both"]
    words += ["--predictions", tmp_path / "all.csv", "--out", tmp_path / "out"]
    lines = results(torchrun(num_processes, *words) if num_processes > 1 else python(*words))
    if num_processes == 1:
        assert lines == both[0]
        assert (tmp_path / "all.csv").read_bytes() == both[1].read_bytes()
        for path in (tmp_path / "out").glob("*.json"):
            first = json.loads((run[0] / "evaluations" / path.name).read_text())
            assert json.loads(path.read_text())["result"] == first["result"]
        return
    for key, line in lines.items():
        for name, value in line.items():
            assert value == (pytest.approx(both[0][key][name], rel=1e-6) if name in ("loss", "ece") else value)
            assert value == both[0][key][name] or name in ("loss", "ece")
    with open(tmp_path / "all.csv", newline="") as file, open(both[1], newline="") as first:
        pairs = zip(csv.DictReader(file), csv.DictReader(first), strict=True)
        assert all(a[name] == b[name] for a, b in pairs for name in a if name != "confidence")


def test_shards_and_folders_are_judged_alike(run, sets, both, tmp_path, call):
    succeed(python("-m", "data_prep.shard", sets / "imagenet/val", tmp_path / "wds", "--split", "val"))
    words = ["--data_dir", f"real={tmp_path}/wds", "--data_dir", f"imagenet={tmp_path}/wds", "--batch-size", 4]
    lines = call(run[0], *words, "--out", tmp_path / "out")
    assert [line["name"] for line in lines] == ["real", "imagenet"]
    for line in lines:
        wanted = both[0][line["name"], "ema"]
        for key in ("num_samples", "correct_top1", "correct_top5"):
            assert line[key] == wanted[key]
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-6)


@torch.no_grad()
def test_an_average_of_checkpoints_seen_from_both_sides(run, sets, tmp_path, call):
    folder, models = run
    steps = [folder / f"checkpoints/step_{step:08d}" for step in STEPS]
    words = ["--data_dir", f"imagenet={sets}/imagenet", "--tta", "flip", "--out", tmp_path]
    (line,) = call(*steps, "--average", *words)
    mean = build_model(load_config(ROOT / "tests/helpers/golden.yaml", ["model.num_classes=1000"])[0].model).eval()
    states = [models[step, "ema"].state_dict() for step in STEPS]
    mean.load_state_dict({name: (states[0][name] + states[1][name]) / 2 for name in states[0]})
    losses = []
    for path, image in images_of(sets / "imagenet"):
        shares = mean(torch.stack([image, image.flip(2)])).softmax(1).mean(0)
        losses.append(-shares[IMAGENET.index(path.parent.name)].log().item())
    assert line["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    (record,) = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert record["checkpoint"]["path"] == f"{steps[0]} + {steps[1]}"
    assert (record["checkpoint"]["step"], record["options"]["tta"]) == (None, "flip")


@pytest.mark.dist
def test_ten_crops_at_two_sizes(run, sets, tmp_path):
    """Their numbers are test_views.py's; here, that everything goes through, on two processes."""
    words = ["--data_dir", f"v2={sets}/v2", "--tta", "ten-crop", "--img-size", "32,64", "--crop-pct", "0.8"]
    done = torchrun(2, "evaluate.py", run[0], *words, "--resize", "squash", "--out", tmp_path)
    assert results(done)["v2", "ema"]["num_samples"] == 5
    (path,) = tmp_path.glob("*.json")
    assert path.name == "v2-ema-step_00000008-32+64-crop0.8-squash-ten-crop.json"
    assert "5 (of 10000)" in done.stderr


def test_the_benchmark_needs_no_data(run, call, monkeypatch):
    monkeypatch.setattr(latency, "_SECONDS", 0.1)
    rows = call(run[0], "--benchmark", "--batch-size", "1,3", "--img-size", "64")
    assert [(row["batch_size"], row["img_size"]) for row in rows] == [(1, [64]), (3, [64])]
    for row in rows:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["images_per_second"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data_dir", "v3={sets}/v2"], "unknown label set: got v3; expected: imagenet, real, v2"),
        (["--data_dir", "a={sets}/v2"], "5 classes of the data are not of the set a: got 0, 10, 100"),
        (["--data_dir", "real={sets}/a"], "labels of ImageNet ReaL go by the names of the images"),
        (["--data_dir", "a={sets}/a", "--data_dir", "a={sets}/a"], "the same set twice"),
        (["--data_dir", "{sets}/imagenet"], "another number of classes than the model: got 22 classes"),
        (["--data_dir", "a={sets}/a", "--predictions", "{sets}/x.txt"], "expected: *.csv or *.parquet"),
        (["--data_dir", "a={sets}/a", "--resize", "squash", "--tta", "ten-crop"], "ten crops of the whole image"),
        (["--data_dir", "a={sets}/a", "--out", "/proc/nowhere"], "cannot write to --out"),
    ],
)
def test_mistakes_are_told(words, message, run, sets, monkeypatch):
    assert message in refusal(evaluate.main, monkeypatch, run[0], *[word.format(sets=sets) for word in words])


@pytest.mark.dist
def test_a_corrupt_checkpoint_is_told_by_all_ranks(run, sets, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    part = next((folder / "checkpoints/step_00000008").glob("*.safetensors"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    done = torchrun(2, "evaluate.py", folder, "--data_dir", f"a={sets}/a")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "corrupt checkpoint" in errors[0]
