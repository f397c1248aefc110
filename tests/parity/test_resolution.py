"""Images of any size: the whole model against attention written window by window, and what holds for every size."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gcvit.model import create_model
from gcvit.model.attention import WindowAttention
from gcvit.model.gcvit import GCViT

TINY: dict[str, Any] = {"width": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4], "num_classes": 3}
SIDES = st.integers(32, 160)


def build_model(**arguments: Any) -> GCViT:
    """A tiny model in float64, none of whose weights is too small to be noticed."""
    model = create_model("gc_vit_xxtiny", **TINY | arguments).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            if name.endswith("bias_table"):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return model


def random_images(num_images: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randn(num_images, 3, height, width, dtype=torch.float64, generator=generator)


def attend_window_by_window(attention: WindowAttention, x_bhwc: Tensor, queries_bwwc: Tensor) -> Tensor:
    """What window attention is on a map of any size: the last windows are cut off where the map ends."""
    _, height, width, dim = x_bhwc.shape
    window, num_heads = attention.window, attention.num_heads
    parts = attention.qkv(x_bhwc).split(dim, dim=-1)
    rows = []
    for top in range(0, height, window):
        tiles = []
        for left in range(0, width, window):
            *own, k, v = (part[:, top : top + window, left : left + window] for part in parts)
            tile_height, tile_width = k.shape[1:3]
            q = own[0] if own else queries_bwwc[:, :tile_height, :tile_width]
            q, k, v = (t.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
            y, x = (
                axis.flatten()
                for axis in torch.meshgrid(torch.arange(tile_height), torch.arange(tile_width), indexing="ij")
            )
            offsets_y, offsets_x = (axis[:, None] - axis[None, :] + window - 1 for axis in (y, x))
            bias = attention.bias_table[offsets_y * (2 * window - 1) + offsets_x].permute(2, 0, 1)
            out = (attention.scale * q @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v
            tiles.append(out.transpose(1, 2).flatten(2).unflatten(1, (tile_height, tile_width)))
        rows.append(torch.cat(tiles, dim=2))
    return attention.proj(torch.cat(rows, dim=1))


@pytest.mark.parametrize(
    ("arguments", "sides"),
    [
        ({"img_size": 64}, (64, 64)),
        ({"img_size": 75}, (75, 75)),
        ({"img_size": (64, 100)}, (64, 100)),
        ({"img_size": (97, 50), "windows": [5, 3, 7, 4]}, (97, 50)),
        ({"img_size": 64, "dynamic_img_size": True}, (150, 90)),
        ({"img_size": 160, "dynamic_img_size": True}, (33, 70)),
    ],
)
def test_logits_and_gradients_equal_those_of_windows_taken_one_by_one(
    arguments: dict[str, Any], sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = build_model(**arguments), random_images(2, *sides)
    names, parameters = zip(*model.named_parameters(), strict=True)
    logits = model(images)
    gradients = torch.autograd.grad(logits.square().sum(), parameters)
    monkeypatch.setattr(WindowAttention, "forward", attend_window_by_window)
    expected = model(images)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    others = torch.autograd.grad(expected.square().sum(), parameters)
    for name, gradient, other in zip(names, gradients, others, strict=True):
        assert gradient.abs().max() > 0, name
        assert (gradient - other).norm() < 1e-10 * other.norm(), name


@given(
    height=SIDES,
    width=SIDES,
    windows=st.one_of(st.none(), st.lists(st.integers(3, 8), min_size=4, max_size=4)),
    other=st.tuples(SIDES, SIDES),
)
@settings(max_examples=25, deadline=None)
def test_every_size_and_window_works(
    height: int, width: int, windows: list[int] | None, other: tuple[int, int]
) -> None:
    given_windows = {} if windows is None else {"windows": windows}
    model = build_model(img_size=(height, width), dynamic_img_size=True, **given_windows)
    for sides in ((height, width), other):
        images = random_images(3, *sides)
        maps = model.forward_intermediates(images, intermediates_only=True)
        strides = [4, 8, 16, 32]
        assert [tuple(x.shape[2:]) for x in maps] == [tuple(math.ceil(side / s) for side in sides) for s in strides]
        logits = model(images)
        assert logits.shape == (3, 3)
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(logits, alone, rtol=1e-9, atol=1e-9)
        model.zero_grad()
        logits.square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        assert model.stem.conv.weight.grad.any()
