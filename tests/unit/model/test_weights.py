"""Weights in three layouts, and files that are none of them."""

import argparse
import functools
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from gcvit.errors import UserError
from gcvit.model import create_model, fitting, weights
from gcvit.model.gcvit import GCViT

SMALL: dict[str, Any] = {
    "width": 16,
    "depths": [2, 2, 3, 2],
    "num_heads": [1, 2, 4, 8],
    "img_size": 64,
    "num_classes": 5,
}


def build_model(seed: int, name: str = "gc_vit_small", **arguments: Any) -> GCViT:
    model = create_model(name, **SMALL | arguments)
    model.init_weights(seed)
    return model


@functools.cache
def source_model() -> GCViT:
    """The model whose weights are saved; nobody changes it."""
    return build_model(1)


def assert_same_weights(model: GCViT, other: GCViT) -> None:
    for (name, value), (_, expected) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(value, expected), name


LAYOUTS = {"gcvit": dict, "official": weights.to_official_state, "timm": weights.to_timm_state}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("container", "prefix"), [(None, ""), ("state_dict", "module."), ("model", "module._orig_mod.")]
)
def test_round_trip_in_every_layout(layout: str, container: str | None, prefix: str, tmp_path: Path) -> None:
    source, target = source_model(), build_model(2)
    state = {prefix + name: value for name, value in LAYOUTS[layout](source.state_dict()).items()}
    path = tmp_path / "weights.pth.tar"
    torch.save(state if container is None else {container: state, "epoch": 3}, path)
    found = weights.load(target, path)
    assert_same_weights(target, source)
    num_tensors = len(source.state_dict())
    assert found == f"{path}: {layout} layout, {container or 'bare tensors'}, {num_tensors} tensors"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_safetensors(layout: str, tmp_path: Path) -> None:
    source, target = source_model(), build_model(2)
    path = tmp_path / "model.safetensors"
    state = {name: value.contiguous() for name, value in LAYOUTS[layout](source.state_dict()).items()}
    safetensors.torch.save_file(state, path)
    weights.load(target, path)
    assert_same_weights(target, source)


def test_names_of_different_parameters_stay_different() -> None:
    with torch.device("meta"):
        names = list(create_model("gc_vit_large").initial_laws)
    for translate in (weights.to_official, weights.to_timm):
        assert len({translate(name) for name in names}) == len(names)


def test_averaged_weights_come_first_and_arguments_are_harmless(tmp_path: Path) -> None:
    plain, averaged, target = source_model(), build_model(2), build_model(3)
    checkpoint = {
        "state_dict": weights.to_official_state(plain.state_dict()),
        "state_dict_ema": weights.to_official_state(averaged.state_dict()),
        "args": argparse.Namespace(lr=0.1),
    }
    torch.save(checkpoint, tmp_path / "both.pth.tar")
    assert "state_dict_ema" in weights.load(target, tmp_path / "both.pth.tar")
    assert_same_weights(target, averaged)


def test_dtype_of_the_model_is_kept(tmp_path: Path) -> None:
    source, target = source_model(), build_model(2).double()
    torch.save(source.state_dict(), tmp_path / "fp32.pth")
    weights.load(target, tmp_path / "fp32.pth")
    assert target.stem.conv.weight.dtype == torch.float64
    assert torch.equal(target.stem.conv.weight, source.stem.conv.weight.double())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_timm_loads_pretrained_weights_of_every_layout(layout: str, tmp_path: Path) -> None:
    source = source_model()
    path = tmp_path / "pretrained.pth.tar"
    torch.save({"state_dict": LAYOUTS[layout](source.state_dict())}, path)
    overlay = {"file": str(path), "num_classes": 5}
    arguments = dict(pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    assert_same_weights(timm.create_model("gc_vit_small", **arguments), source)
    larger = timm.create_model("gc_vit_small", **arguments | {"img_size": 96})
    name = "stages.0.blocks.0.attention.bias_table"
    assert torch.equal(larger.state_dict()[name], fitting.resample_bias_table(source.state_dict()[name], 3))
    other_head = timm.create_model("gc_vit_small", **arguments | {"num_classes": 3})
    assert other_head.head.fc.weight.shape == (3, 128)
    assert torch.equal(other_head.stem.conv.weight, source.stem.conv.weight)


def test_another_class_count_is_said_and_can_be_waived(tmp_path: Path) -> None:
    source, target = source_model(), build_model(2, num_classes=7)
    path = tmp_path / "five.pth"
    torch.save(weights.to_official_state(source.state_dict()), path)
    head = target.head.fc.weight.clone()
    with pytest.raises(UserError, match="another number of classes than the model: got 5; expected: 7"):
        weights.load(target, path)
    assert weights.load(target, path, reset_head=True).endswith("without its head")
    assert torch.equal(target.head.fc.weight, head)
    assert torch.equal(target.norm.weight, source.norm.weight)
    assert torch.equal(target.stem.conv.weight, source.stem.conv.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 32}, "stem.conv.weight is (16, 3, 3, 3) and not (32, 3, 3, 3)"),
        ({"depths": [2, 2, 9, 2]}, "stages.2.blocks.3.norm1.weight is missing"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_model_is_refused_and_nothing_is_changed(
    arguments: dict[str, Any], message: str, layout: str, tmp_path: Path
) -> None:
    path = tmp_path / "other.pth"
    torch.save(LAYOUTS[layout](source_model().state_dict()), path)
    target = build_model(2, **arguments)
    with pytest.raises(UserError) as caught:
        weights.load(target, path)
    assert "is of another model" in str(caught.value)
    assert message in str(caught.value)
    assert_same_weights(target, build_model(2, **arguments))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"img_size": 128},
            "has other windows than the model: got [2, 2, 4, 2]; expected: [4, 4, 8, 4]; hint: build the model with "
            "those windows, or let the bias tables be resampled (resample)",
        ),
        (
            {"img_size": 128, "windows": [2, 2, 4, 2]},
            "pools its global queries another number of times than the model: got [3, 2, 1, 1] fused blocks; "
            "expected: [4, 3, 1, 1]; hint: let the windows grow",
        ),
        (
            {"windows": [4, 2, 4, 1]},
            "pools its global queries another number of times than the model: got [3, 2, 1, 1] fused blocks; "
            "expected: [2, 2, 1, 1]; hint: let the windows grow",
        ),
        ({"num_heads": [2, 2, 4, 8]}, "is of another model: got stages.0.blocks.0.attention.bias_table is (9, 1)"),
    ],
)
def test_another_size_is_refused_until_asked_for(
    arguments: dict[str, Any], message: str, layout: str, tmp_path: Path
) -> None:
    path = tmp_path / "small.pth"
    torch.save(LAYOUTS[layout](source_model().state_dict()), path)
    with pytest.raises(UserError) as caught:
        weights.load(build_model(2, **arguments), path)
    assert f"{path} {message}" in str(caught.value)


def test_a_lost_tensor_of_a_query_generator_is_named(tmp_path: Path) -> None:
    state = dict(source_model().state_dict())
    del state["stages.0.query_generator.fused.1.pointwise.weight"]
    torch.save(state, tmp_path / "lost.pth")
    with pytest.raises(UserError, match=r"another model: got stages\.0\.query_generator\.fused\.1\.pointwise\.weight"):
        weights.load(build_model(2), tmp_path / "lost.pth")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bias_tables_are_resampled_when_asked_for(layout: str, tmp_path: Path) -> None:
    source, target = source_model(), build_model(2, img_size=96)
    path = tmp_path / "small.pth"
    torch.save(LAYOUTS[layout](source.state_dict()), path)
    found = weights.load(target, path, resample=True)
    assert found == (
        f"{path}: {layout} layout, bare tensors, {len(source.state_dict())} tensors, "
        "bias tables resampled 2 -> 3 and 4 -> 6"
    )
    for name, value in source.state_dict().items():
        window = {2: 3, 4: 6}.get(fitting.window_of(value.shape)) if name.endswith("bias_table") else None
        expected = value if window is None else fitting.resample_bias_table(value, window)
        assert torch.equal(target.state_dict()[name], expected), name


def test_a_new_head_and_new_windows_together(tmp_path: Path) -> None:
    """The way from 21K classes at 224 to 1K at 384, in small."""
    source, target = source_model(), build_model(2, img_size=96, num_classes=3)
    torch.save(source.state_dict(), tmp_path / "small.pth")
    head = target.head.fc.weight.clone()
    found = weights.load(target, tmp_path / "small.pth", reset_head=True, resample=True)
    num_tensors = len(source.state_dict()) - 2
    assert found.endswith(f"{num_tensors} tensors, bias tables resampled 2 -> 3 and 4 -> 6, without its head")
    assert torch.equal(target.head.fc.weight, head)
    assert torch.equal(target.norm.weight, source.norm.weight)
    assert target(torch.randn(1, 3, 96, 96)).shape == (1, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"depths": [2, 2, 2, 2]}, "stages.2.blocks.2.norm1.weight"),
        ({"layer_scale": None}, "stages.0.blocks.0.scale1.gamma"),
    ],
)
def test_what_the_model_lacks_is_named_as_in_the_file(
    arguments: dict[str, Any], name: str, layout: str, tmp_path: Path
) -> None:
    path = tmp_path / "other.pth"
    torch.save(LAYOUTS[layout](source_model().state_dict()), path)
    with pytest.raises(UserError) as caught:
        weights.load(build_model(2, **arguments), path)
    assert f"is of another model: got {weights.LAYOUTS[layout](name)} is unknown" in str(caught.value)


def test_without_strict_what_is_there_is_loaded(tmp_path: Path) -> None:
    source, target = source_model(), build_model(2)
    state: dict[str, Tensor] = dict(source.state_dict())
    del state["norm.weight"]
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "partial.pth")
    with pytest.raises(UserError, match=r"norm\.weight is missing, extra is unknown"):
        weights.load(target, tmp_path / "partial.pth")
    weights.load(target, tmp_path / "partial.pth", strict=False)
    assert_same_weights(target, source)  # a LayerNorm starts at one with every seed


class Payload:
    """An object that a pickle would rebuild by running code."""


def write_garbage(path: Path) -> None:
    path.write_bytes(b"no checkpoint at all")


def write_truncated(path: Path) -> None:
    torch.save(source_model().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such weights file"),
        (lambda path: path.mkdir(), "no such weights file"),
        (lambda path: path.touch(), "not a checkpoint that can be read safely"),
        (write_garbage, "not a checkpoint that can be read safely"),
        (write_truncated, "not a checkpoint that can be read safely"),
        (
            lambda path: torch.save({"state_dict": Payload()}, path),
            "not a checkpoint that can be read safely",
        ),
        (lambda path: torch.save([1, 2], path), "holds no named tensors"),
        (lambda path: torch.save({"epoch": 3}, path), "holds no named tensors"),
        (lambda path: torch.save(timm.create_model("resnet10t").state_dict(), path), "holds no GC ViT"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
def test_files_that_are_no_checkpoint(write: Any, message: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    write(path)
    if suffix == ".safetensors" and path.is_file():
        message = "not a checkpoint that can be read safely"
    with pytest.raises(UserError) as caught:
        weights.load(build_model(2), path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_weights_for_a_model_on_meta(tmp_path: Path) -> None:
    """What an engine that shards asks for: whole tensors by name, checked against the recorded shapes."""
    source = source_model()
    torch.save(weights.to_timm_state(source.state_dict()), tmp_path / "timm.pth")
    with torch.device("meta"):
        model = create_model("gc_vit_small", **SMALL)
    state, _ = weights.read_fitting(model, tmp_path / "timm.pth")
    assert state.keys() == model.initial_laws.keys()
    assert all(torch.equal(state[name], value) for name, value in source.state_dict().items())
