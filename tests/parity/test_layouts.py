"""Every variant's weights in every layout: the same logits, the same bits on the way back, timm's own classes too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.gcvit import GlobalContextVit
from torch import Tensor, nn

from gcvit.model import VARIANTS, create_model, weights
from gcvit.model.gcvit import GCViT

LAYOUTS = list(weights.CONVERTERS)
QUICK = {"gc_vit_xxtiny", "gc_vit_xtiny", "gc_vit_tiny", "gc_vit_tiny2", "gc_vit_small"}
SIZED = [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in VARIANTS]


def build_on_meta(name: str, **arguments: Any) -> GCViT:
    with torch.device("meta"):
        return create_model(name, **arguments)


def draw_model(name: str) -> GCViT:
    """The variant for small images, no weight of which is too small to be noticed."""
    model = create_model(name, num_classes=7, img_size=64, drop_path_rate=0.0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if key.endswith("bias_table"):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_((0.5 if "gamma" in key else parameter) + 0.1 * noise)
    return model


def build_timms(name: str) -> nn.Module:
    """timm's class with the variant's arguments, also where timm has no function of that name."""
    row = VARIANTS[name]
    return GlobalContextVit(
        img_size=64,
        num_classes=7,
        embed_dim=row.width,
        depths=row.depths,
        num_heads=row.num_heads,
        mlp_ratio=row.mlp_ratio,
        layer_scale=row.layer_scale,
    ).eval()


def draw_images(batch_size: int) -> Tensor:
    return torch.randn(batch_size, 3, 64, 64, generator=torch.Generator().manual_seed(batch_size))


@pytest.mark.parametrize("name", SIZED)
@torch.no_grad()
def test_round_trips_and_logits(name: str, tmp_path: Path) -> None:
    model = draw_model(name)
    images = draw_images(2)
    expected = model(images)
    first = tmp_path / "first.pth.tar"
    wrapped = {f"module.{key}": tensor for key, tensor in weights.to_official_state(model.state_dict()).items()}
    torch.save({"state_dict_ema": wrapped, "epoch": 300}, first)
    steps = [("timm", "safetensors"), ("gcvit", "pth"), ("timm", "pth")]  # each layout to each other, in both formats
    steps += [("official", "pth.tar"), ("gcvit", "safetensors"), ("official", "safetensors")]
    source = first
    for number, (layout, suffix) in enumerate(steps):
        target = tmp_path / f"{number}.{suffix}"
        weights.convert(source, target, layout, name)
        found, _, said = weights.read_model(target, name)
        assert f"{target}: {layout} layout" in said
        assert torch.equal(found.eval()(images), expected)
        source.unlink()
        source = target
    last, official = weights.read(source)[0], weights.to_official_state(model.state_dict())
    assert last.keys() == official.keys()
    assert all(torch.equal(last[key], tensor) for key, tensor in official.items())


@pytest.mark.parametrize("name", SIZED)
@torch.no_grad()
def test_timms_class_computes_the_same(name: str, tmp_path: Path) -> None:
    """In float64, to what the rounding of timm's scale d^-0.5 leaves: ours is the official one, an fp32 number."""
    ours, theirs = draw_model(name), build_timms(name)
    torch.save(weights.to_official_state(ours.state_dict()), tmp_path / "official.pth")
    weights.convert(tmp_path / "official.pth", tmp_path / "timm.pth", "timm", name)
    theirs.load_state_dict(torch.load(tmp_path / "timm.pth", weights_only=True))
    ours.double()
    theirs.double()
    for batch_size in (1, 4):
        images = draw_images(batch_size).double()
        logits = ours(images)
        torch.testing.assert_close(theirs(images), logits, rtol=1e-5, atol=1e-5 * logits.abs().max().item())


@pytest.mark.parametrize("name", VARIANTS)
def test_timms_file_is_read(name: str, tmp_path: Path) -> None:
    """The way back: what timm's class saved, by names and shapes that are timm's alone."""
    with torch.device("meta"):
        theirs = build_timms(name)
    arguments = weights.identify(theirs.state_dict(), "file", name)
    assert arguments == {"name": name, "num_classes": 7, "img_size": 64, "in_chans": 3}
    expected = weights.to_timm_state(build_on_meta(**arguments).state_dict())
    assert {k: t.shape for k, t in theirs.state_dict().items()} == {k: t.shape for k, t in expected.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_known_by_its_shapes(name: str) -> None:
    row = VARIANTS[name]
    model = build_on_meta(name)
    for convert in weights.CONVERTERS.values():
        found = weights.identify(convert(model.state_dict()), "file")
        assert found == {"name": name, "num_classes": 1000, "img_size": row.img_size, "in_chans": 3}


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_classes": 21841}, "gc_vit_large"),
        ({"num_classes": 0}, "gc_vit_large"),
        ({"img_size": 384}, "gc_vit_large_384"),  # the same weights
        ({"img_size": 448, "in_chans": 1}, "gc_vit_large"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_classes_sizes_and_channels_are_read_too(arguments: dict[str, Any], name: str, layout: str) -> None:
    state = weights.CONVERTERS[layout](build_on_meta("gc_vit_large", **arguments).state_dict())
    expected = {"name": name, "num_classes": 1000, "img_size": 224, "in_chans": 3} | arguments
    assert weights.identify(state, "file") == expected
    assert weights.identify(state, "file", "gc_vit_large_512") == expected | {"name": "gc_vit_large_512"}
