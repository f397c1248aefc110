"""What is exported, timm and evaluate.py compute with as the run does; what cannot be exported leaves nothing."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors
import timm
import torch
from timm.data import resolve_data_config
from torch import nn

from gcvit.checkpoint import store, weights_source
from gcvit.checkpoint.store import RunState
from gcvit.config.load import load_config
from gcvit.config.schema import Config, ModelConfig
from gcvit.errors import UserError
from gcvit.export.timm_hub import export, name_in_timm
from gcvit.model import VARIANTS, GCViT, weights
from gcvit.model.from_config import build_model
from gcvit.parallel.engine import Fragment
from gcvit.runtime.distributed import World, join_world
from tests.helpers.launching import ROOT

CLASSES = [f"class_{label}" for label in range(10)]
STATE = RunState(step=7, samples=224)
VARIANT = ["model.overrides=null", "model.num_classes=10"]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with join_world() as joined:
        yield joined


def draw_model(config: Config, seed: int) -> GCViT:
    """A model none of whose parameters is at its initial value, which may be zero."""
    model = build_model(config.model).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def save_run(folder: Path, world: World, *overrides: str, kinds=("model", "ema")) -> tuple[Path, dict[str, GCViT]]:
    """A run folder with one checkpoint, and its models."""
    config, _ = load_config(ROOT / "tests/helpers/golden.yaml", [*overrides, "data.dir=/somewhere/of/mine"])
    models = {kind: draw_model(config, seed) for seed, kind in enumerate(kinds)}
    tensors = {
        kind: {n: Fragment(p.detach().view(-1), 0, p.shape) for n, p in model.named_parameters()}
        for kind, model in models.items()
    }
    info = {"config": config.model_dump(mode="json"), "data": "", "world_size": 1, "classes": CLASSES}
    store.save(folder / "checkpoints", STATE, tensors, info, world)
    return folder, models


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> tuple[Path, dict[str, GCViT]]:
    """Of a variant that timm has, at its own image size."""
    overrides = [*VARIANT, "model.img_size=224", "data.crop_pct=0.9", "data.eval_resize=squash"]
    return save_run(tmp_path_factory.mktemp("run"), world, *overrides)


@torch.no_grad()
def assert_same_logits(model: nn.Module, expected: nn.Module, img_size: int) -> None:
    images = torch.randn(3, 3, img_size, img_size, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(model.eval()(images), expected(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "layout"), [(None, None), ("model", "timm"), ("ema", "own")])
def test_timm_loads_the_folder_and_the_file(run, tmp_path, layout, kind):
    folder, models = run
    out = tmp_path / "out"
    said = export(folder, out, kind, layout)
    expected = models[kind or "ema"]
    name = "gc_vit_xxtiny" if layout == "own" else "gcvit_xxtiny"
    assert name in said
    assert f'timm.create_model("local-dir:{out}", pretrained=True)' in said
    assert ("import gcvit.model" in said) == (layout == "own")
    of_folder = timm.create_model(f"local-dir:{out}", pretrained=True)
    overlay = {"file": str(out / "model.safetensors"), "num_classes": 10}
    of_file = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10)
    assert type(of_folder).__module__ == ("gcvit.model.gcvit" if layout == "own" else "timm.models.gcvit")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    wanted = expected.state_dict() if layout == "own" else weights.to_timm_state(expected.state_dict())
    for model in (of_folder, of_file):
        assert model.state_dict().keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[n]) for n, tensor in model.state_dict().items())
    if layout is None:
        assert_same_logits(of_folder, expected, 224)


def test_timm_prepares_images_as_the_run_does(run, tmp_path):
    folder, _ = run
    export(folder, tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    data = resolve_data_config(model=model)
    assert (data["input_size"], data["crop_pct"], data["crop_mode"]) == ((3, 224, 224), 0.9, "squash")
    assert (data["interpolation"], *data["mean"]) == ("bicubic", 0.485, 0.456, 0.406)
    assert list(data["std"]) == [0.229, 0.224, 0.225]
    assert list(model.pretrained_cfg["label_names"]) == CLASSES
    # A head of another size starts afresh, the rest is kept.
    other = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=3)
    assert other.num_classes == 3
    assert torch.equal(other.stem.conv1.weight, model.stem.conv1.weight)


@pytest.mark.parametrize("layout", ["timm", "own"])
def test_evaluate_loads_the_folder_and_the_file(run, world, tmp_path, layout):
    folder, models = run
    out = tmp_path / "out"
    export(folder, out, layout=layout)
    of_folder = weights_source.find_candidate(str(out))
    of_file = weights_source.find_file("gc_vit_xxtiny", str(out / "model.safetensors"))
    assert (of_folder.data.crop_pct, of_folder.data.eval_resize) == (0.9, "squash")
    assert of_folder.classes == tuple(CLASSES)
    for found in (of_folder, of_file):
        assert found.model.num_classes == 10
        model, wanted = weights_source.load(found, found.read(world), 224), models["ema"].state_dict()
        assert all(torch.equal(tensor, wanted[n]) for n, tensor in model.state_dict().items())
    with pytest.raises(UserError, match="one kind of weights"):
        weights_source.find_candidate(str(out), "model")


@pytest.mark.parametrize(
    ("overrides", "img_size", "is_timms"),
    [
        ([*VARIANT, "model.img_size=64"], 64, True),
        (["model.num_classes=10"], 32, False),
    ],
    ids=["another size", "overrides"],
)
def test_every_model_finds_its_layout(world, tmp_path, overrides, img_size, is_timms):
    folder, models = save_run(tmp_path / "run", world, *overrides, kinds=("model",))
    export(folder)
    loaded = timm.create_model(f"local-dir:{folder / 'export'}", pretrained=True)
    assert (type(loaded).__module__ == "timm.models.gcvit") == is_timms
    assert_same_logits(loaded, models["model"], img_size)
    if not is_timms:
        with pytest.raises(UserError, match="timm has no such architecture"):
            export(folder, tmp_path / "out", layout="timm")
        assert not (tmp_path / "out").exists()


def test_timm_has_five_of_the_variants():
    found = {name: name_in_timm(ModelConfig(name=name)) for name in VARIANTS}
    assert {ours: theirs for ours, theirs in found.items() if theirs} == {
        f"gc_vit_{size}": f"gcvit_{size}" for size in ("xxtiny", "xtiny", "tiny", "small", "base")
    }


@pytest.mark.parametrize(("img_size", "has_it"), [(224, True), (256, True), (300, False), (240, False)])
def test_timm_takes_only_whole_windows(img_size, has_it):
    found = name_in_timm(ModelConfig(name="gc_vit_tiny", img_size=img_size))
    assert found == ("gcvit_tiny" if has_it else None)
    if not has_it:  # it does crash, so that None is no mere caution
        with torch.device("meta"), pytest.raises((RuntimeError, AssertionError)):
            timm.create_model("gcvit_xxtiny", img_size=img_size)(torch.empty(1, 3, img_size, img_size))


def test_the_file_says_where_it_comes_from_and_no_folder(run, tmp_path):
    folder, _ = run
    export(next((folder / "checkpoints").iterdir()), tmp_path / "out")  # of a checkpoint
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["weights"], metadata["step"], metadata["samples"]) == ("ema", "7", "224")
    assert json.loads(metadata["config"])["model"]["name"] == "gc_vit_xxtiny"
    assert "somewhere" not in metadata["config"]
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # whoever may read one file may read the other


def test_what_cannot_be_exported_leaves_nothing(run, world, tmp_path):
    plain, _ = save_run(tmp_path / "plain", world, kinds=("model",))
    with pytest.raises(UserError, match="no EMA"):
        export(plain, kind="ema")
    with pytest.raises(UserError, match="no checkpoint"):
        export(tmp_path / "nowhere")
    assert sorted(path.name for path in plain.iterdir()) == ["checkpoints"]
    export(plain)
    before = {path.name: path.read_bytes() for path in (plain / "export").iterdir()}
    with pytest.raises(UserError, match="something is there already"):
        export(plain)
    assert before == {path.name: path.read_bytes() for path in (plain / "export").iterdir()}
    with pytest.raises(UserError, match="cannot write"):
        export(plain, Path("/proc/nowhere/out"))


def test_a_file_of_others_is_no_export(tmp_path):
    for content in ({}, {"config": "{"}):
        safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", content or None)
        with pytest.raises(UserError, match=r"model\.safetensors"):
            weights_source.find_candidate(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot read"):
        weights_source.find_candidate(str(tmp_path))
