"""Weights files written in another layout, and which variant a file is of."""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gcvit.errors import UserError
from gcvit.model import VARIANTS, create_model, weights
from gcvit.model.gcvit import GCViT

LAYOUTS = list(weights.CONVERTERS)


def build_on_meta(name: str, **arguments: Any) -> GCViT:
    with torch.device("meta"):
        return create_model(name, **arguments)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module", autouse=True)
def small_variant() -> Iterator[None]:
    """A row that is quick to build, in the place of the smallest one."""
    row = replace(VARIANTS["gc_vit_xxtiny"], width=16, depths=(2, 2, 3, 2), num_heads=(1, 2, 4, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "gc_vit_xxtiny", row)
        yield


@pytest.fixture(scope="module")
def model(small_variant: None) -> GCViT:
    return create_model("gc_vit_xxtiny", num_classes=3, img_size=64)


@pytest.mark.parametrize("through", LAYOUTS)
@pytest.mark.parametrize("suffixes", [(".pth.tar", ".safetensors"), (".safetensors", ".pt")])
def test_there_and_back_every_bit_is_kept(
    model: GCViT, through: str, suffixes: tuple[str, str], tmp_path: Path
) -> None:
    official = weights.to_official_state({name: tensor.half() for name, tensor in model.state_dict().items()})
    source = tmp_path / "published.pth.tar"
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in official.items()}, "epoch": 3}, source)
    there, back = (tmp_path / f"{step}{suffix}" for step, suffix in zip(("there", "back"), suffixes, strict=True))
    found, written = weights.convert(source, there, through).splitlines()
    num_tensors = len(model.state_dict())
    assert found == (
        f"{source}: official layout, state_dict, {num_tensors} tensors, gc_vit_xxtiny of 3 classes at 64 pixels"
    )
    assert written.startswith(f"{there}: {through} layout, ")
    weights.convert(there, back, "official")
    assert_equal(weights.read(back)[0], official)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, there.name, back.name])


def test_the_official_layout_stands_where_the_published_does(model: GCViT, tmp_path: Path) -> None:
    source = tmp_path / "ours.pth"
    torch.save(model.state_dict(), source)
    weights.convert(source, tmp_path / "official.pth.tar", "official")
    content = torch.load(tmp_path / "official.pth.tar", weights_only=True)
    assert list(content) == ["state_dict"]
    assert_equal(content["state_dict"], weights.to_official_state(model.state_dict()))
    weights.convert(source, tmp_path / "timm.pth", "timm")
    assert_equal(torch.load(tmp_path / "timm.pth", weights_only=True), weights.to_timm_state(model.state_dict()))


def test_views_of_one_storage_become_whole_tensors(model: GCViT, tmp_path: Path) -> None:
    flat = torch.cat([tensor.flatten() for tensor in model.state_dict().values()])
    parts = flat.split([tensor.numel() for tensor in model.state_dict().values()])
    state = {name: part.view(t.shape) for (name, t), part in zip(model.state_dict().items(), parts, strict=True)}
    torch.save(state, tmp_path / "views.pth")
    for name in ("whole.safetensors", "whole.pth"):
        weights.convert(tmp_path / "views.pth", tmp_path / name, "gcvit")
        assert_equal(weights.read(tmp_path / name)[0], dict(model.state_dict()))
        assert (tmp_path / name).stat().st_size < 1.1 * (tmp_path / "views.pth").stat().st_size


@pytest.mark.parametrize(("img_size", "found"), [(300, 304), (240, 240), (64, 64), ((600, 800), 608)])
def test_of_the_sizes_with_the_same_windows_it_is_the_largest(img_size: Any, found: int) -> None:
    model = build_on_meta("gc_vit_xxtiny", img_size=img_size)
    arguments = weights.identify(model.state_dict(), "file")
    assert arguments["img_size"] == found
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in build_on_meta(**arguments).state_dict().items()} == shapes


@pytest.mark.parametrize("name", ["gc_vit_xxtiny", None])
def test_an_architecture_that_is_no_variant(name: str | None, tmp_path: Path) -> None:
    model = create_model("gc_vit_xxtiny", num_classes=3, img_size=64, width=8)
    torch.save(model.state_dict(), tmp_path / "narrow.pth")
    message = (
        "is of another model" if name else "is of no known variant: got width 8, depths [2, 2, 3, 2]; expected: gc"
    )
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        weights.convert(tmp_path / "narrow.pth", tmp_path / "out.pth", "timm", name)
    assert name or "--model NAME" in str(caught.value)
    assert not (tmp_path / "out.pth").exists()


def write_resnet(path: Path) -> None:
    torch.save({"stem.conv.weight": torch.zeros(8, 3, 3, 3), "fc.weight": torch.zeros(3, 8)}, path)


def write_flat(path: Path) -> None:
    """A GC ViT's names with the shapes of parameters that an engine has flattened."""
    state = create_model("gc_vit_xxtiny", num_classes=3, img_size=64).state_dict()
    torch.save({name: tensor.flatten() for name, tensor in state.items()}, path)


@pytest.mark.parametrize(
    ("prepare", "target", "message"),
    [
        (lambda folder: None, "out.pth", "no such weights file"),
        (lambda folder: write_resnet(folder / "in.pth"), "out.pth", "holds no GC ViT"),
        (lambda folder: write_flat(folder / "in.pth"), "out.pth", "holds no GC ViT"),
        (lambda folder: (folder / "out.pth").touch(), "out.pth", "something is there already"),
        (lambda folder: write_resnet(folder / "in.pth"), "in.pth", "something is there already"),
        (lambda folder: None, "out.onnx", "expected: *.safetensors, *.pth, *.pth.tar, *.pt"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(
    prepare: Callable[[Path], None], target: str, message: str, tmp_path: Path
) -> None:
    prepare(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=re.escape(message)):
        weights.convert(tmp_path / "in.pth", tmp_path / target, "timm")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_place_that_cannot_be_written(model: GCViT, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "in.pth")
    (tmp_path / "file").touch()
    for place, suffix in itertools.product((tmp_path / "file", Path("/proc/nowhere")), (".pth", ".safetensors")):
        with pytest.raises(UserError, match="cannot write the weights"):
            weights.convert(tmp_path / "in.pth", place / f"out{suffix}", "timm")


def test_a_model_is_built_as_its_file_says(model: GCViT, tmp_path: Path) -> None:
    torch.save(weights.to_timm_state(model.state_dict()), tmp_path / "timm.pth")
    found, _, said = weights.read_model(tmp_path / "timm.pth", attention="reference")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found.eval()(images), model.eval()(images))
    assert found.stages[0].blocks[0].attention.path == "reference"
    assert said.endswith(
        f"timm layout, bare tensors, {len(model.state_dict())} tensors, gc_vit_xxtiny of 3 classes at 64 pixels"
    )
