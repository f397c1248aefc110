"""What predicts, on which pixels, and what is said of it; images that are none, and checkpoints that are none."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from gcvit import predict
from gcvit.checkpoint import weights_source
from gcvit.checkpoint.weights_source import Classifier, open_classifier
from gcvit.config.schema import DataConfig
from gcvit.data.transforms import EvalTransform, normalize
from gcvit.errors import UserError
from gcvit.export import timm_hub
from gcvit.model import VARIANTS, create_model, weights
from gcvit.runtime.distributed import World, join_world
from tests.unit.export.test_timm_hub import CLASSES, save_run

CPU = torch.device("cpu")
DATA = DataConfig(crop_pct=0.8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with join_world() as joined:
        yield joined


@pytest.fixture(scope="module", autouse=True)
def small_variants() -> Iterator[None]:
    """Rows that are quick to build in the place of two: one crops the centre, the other squashes."""
    small = {"width": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "gc_vit_xtiny", replace(VARIANTS["gc_vit_xtiny"], **small))
        patch.setitem(VARIANTS, "gc_vit_large_384", replace(VARIANTS["gc_vit_large_384"], **small | {"width": 8}))
        yield


@pytest.fixture(scope="module")
def classifier(small_variants: None) -> Classifier:
    model = create_model("gc_vit_xtiny", num_classes=7, img_size=32).eval()
    torch.nn.init.normal_(model.head.fc.weight)
    return Classifier(model, DATA, tuple("abcdefg"), "here")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    (folder / "deep").mkdir()
    for seed, name in enumerate(["b.png", "a.jpg", "deep/c.JPEG", "deep/d.bmp", "e.webp"]):
        pixels = np.random.RandomState(seed).randint(0, 256, (40 + 9 * seed, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_image_gets_its_own_probabilities(classifier: Classifier, images: Path, batch_size: int) -> None:
    paths = predict.list_images([images / "e.webp", images])
    found = list(predict.predict(classifier, paths, batch_size, CPU))
    assert [path.name for path, _ in found] == ["e.webp", "a.jpg", "b.png", "c.JPEG", "d.bmp", "e.webp"]
    transform = EvalTransform(DATA, 32)
    for path, probabilities in found:
        pixels = normalize(transform(path.read_bytes())[None], DATA.mean, DATA.std)
        with torch.no_grad():
            expected = classifier.model(pixels).softmax(1)[0]
        torch.testing.assert_close(probabilities, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[1][1], found[2][1], rtol=1e-3)


def test_what_is_said_of_an_image() -> None:
    shares = torch.tensor([0.125, 0.5, 0.25, 0.125])
    names = ("ant", "bee", "cat", "dog")
    said = predict.describe(Path("x.jpg"), shares, names, 2, as_json=False)
    assert said.splitlines() == ["x.jpg", "   50.00 %  bee", "   25.00 %  cat"]
    line = predict.describe(Path("x.jpg"), shares, names, 9, as_json=True)
    found = json.loads(line)
    assert found["image"] == "x.jpg"
    assert found["classes"][0] == {"label": 1, "name": "bee", "probability": 0.5}
    assert [row["label"] for row in found["classes"][:2]] == [1, 2]
    assert len(found["classes"]) == 4
    assert "\n" not in line


def test_names_are_for_people() -> None:
    imagenet = weights_source.name_classes(None, 1000)
    assert (imagenet[0], imagenet[285], imagenet[999]) == (
        "tench, Tinca tinca",
        "Egyptian cat",
        "toilet tissue, toilet paper, bathroom tissue",
    )
    assert weights_source.name_classes(["n01440764", "mine"], 2) == ("tench, Tinca tinca", "mine")
    assert weights_source.name_classes(None, 2) == ("class 0", "class 1")


def test_an_image_that_is_none_is_named(classifier: Classifier, images: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes((images / "a.jpg").read_bytes()[:400])
    for path in (tmp_path / "cut.jpg", images / "notes.txt", tmp_path / "nowhere.png"):
        with pytest.raises(UserError, match="image") as caught:
            list(predict.predict(classifier, [images / "b.png", path], 32, CPU))
        assert str(path) in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"a folder without images: got .*empty"):
        predict.list_images([images, tmp_path / "empty"])


@pytest.mark.parametrize(
    ("layout", "name", "img_size", "crop_pct", "eval_resize"),
    [("official", "gc_vit_xtiny", 32, 0.875, "crop"), ("timm", "gc_vit_large_384", 384, 1.0, "squash")],
)
def test_a_file_is_prepared_as_its_variant(
    layout: str, name: str, img_size: int, crop_pct: float, eval_resize: str, tmp_path: Path
) -> None:
    model = create_model(name, num_classes=5, img_size=img_size).half()
    state = {key: tensor.contiguous() for key, tensor in weights.CONVERTERS[layout](model.state_dict()).items()}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    found = open_classifier(str(tmp_path / "w.safetensors"), attention="reference")
    assert (found.model.img_size, found.data.crop_pct, found.data.eval_resize) == (img_size, crop_pct, eval_resize)
    assert found.classes == tuple(f"class {i}" for i in range(5))
    assert not found.model.training
    assert found.model.stages[0].blocks[0].attention.path == "reference"
    for key, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key].float()), key  # and fp32 it is


def test_a_run_its_checkpoint_and_its_export_are_the_same(world: World, tmp_path: Path) -> None:
    settings = ["data.crop_pct=0.7", "data.mean=[0.1,0.2,0.3]", "model.attention=sdpa"]
    run, models = save_run(tmp_path / "run", world, *settings)
    timm_hub.export(run)
    (checkpoint,) = (run / "checkpoints").iterdir()
    for place in (run, checkpoint, run / "export"):
        found = open_classifier(str(place))
        assert found.classes == tuple(CLASSES)
        assert (found.data.crop_pct, found.data.mean) == (0.7, (0.1, 0.2, 0.3))
        assert found.model.stages[0].blocks[0].attention.path == "auto"  # what it was trained with may not be here
        assert not found.model.training
        for key, tensor in models["ema"].state_dict().items():
            assert torch.equal(found.model.state_dict()[key], tensor), key
    (run / "export" / "config.json").write_text("[]")
    with pytest.raises(UserError, match="cannot read the names of the classes"):
        open_classifier(str(run / "export"))
    with pytest.raises(UserError, match="a run says itself which model it is"):
        open_classifier(str(run), "gc_vit_tiny")


def test_a_name_fetches_the_published_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = create_model("gc_vit_xtiny", img_size=32)
    torch.save({"state_dict": weights.to_official_state(model.state_dict())}, tmp_path / "w.pth.tar")
    monkeypatch.setattr(weights_source, "fetch_weights", lambda name: str(tmp_path / "w.pth.tar") if name else "")
    monkeypatch.chdir(tmp_path)
    found = open_classifier("gc_vit_xtiny")
    assert torch.equal(found.model.head.fc.weight, model.head.fc.weight)
    assert found.classes[285] == "Egyptian cat"


def test_what_cannot_predict(tmp_path: Path) -> None:
    torch.save(create_model("gc_vit_xtiny", num_classes=0, img_size=32).state_dict(), tmp_path / "headless.pth")
    for source, message in (
        (tmp_path / "headless.pth", "no head"),
        (
            "gc_vit_tny",
            "no such checkpoint: got gc_vit_tny; expected: a run, an export, a weights file, or one of gc_vit",
        ),
        (tmp_path, "no checkpoint here"),
    ):
        with pytest.raises(UserError, match=message):
            open_classifier(str(source))
