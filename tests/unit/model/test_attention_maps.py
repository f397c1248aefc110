"""What is drawn is what the model attends with."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gcvit.errors import UserError
from gcvit.model import VARIANTS, create_model
from gcvit.model.attention import WindowAttention, attend_windows
from gcvit.model.attention_maps import _attend_and_keep, color, draw, draw_file, find_attention, open_image, receive

XXTINY = VARIANTS["gc_vit_xxtiny"]
SHAPE = {"width": 16, "depths": [2, 3, 2, 2], "num_heads": [1, 2, 4, 8]}


def build_attention(is_global: bool, window: int = 3) -> tuple[WindowAttention, torch.Tensor]:
    torch.manual_seed(0)
    attention = WindowAttention(8, 2, window, is_global).double()
    for p in attention.parameters():
        torch.nn.init.normal_(p)
    return attention, torch.randn(2, window, window, 8, dtype=torch.float64)


@pytest.mark.parametrize("is_global", [False, True])
def test_the_weights_are_those_of_the_module(is_global):
    attention, queries = build_attention(is_global)
    x, kept = torch.randn(2, 5, 7, 8, dtype=torch.float64), []
    settings = (attention.bias_table, 3, 2, attention.scale)
    out = attend_windows(
        attention.qkv(x), queries if is_global else None, *settings, lambda *args: _attend_and_keep(kept, *args)
    )
    torch.testing.assert_close(attention.proj(out), attention(x, queries), rtol=1e-12, atol=1e-12)


@settings(max_examples=25)
@given(is_global=st.booleans(), height=st.integers(1, 7), width=st.integers(1, 7), seed=st.integers(0, 99))
def test_the_shares_of_each_window_are_shared_out(is_global, height, width, seed):
    """Over the positions of a window that exist they have a mean of 1, wherever it ends."""
    attention, queries = build_attention(is_global)
    x = torch.randn(2, height, width, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    received = receive(attention, x, queries)
    assert received.shape == (2, height, width)
    for top in range(0, height, 3):
        for left in range(0, width, 3):
            shares = received[:, top : top + 3, left : left + 3].mean((1, 2))
            torch.testing.assert_close(shares, torch.ones(2, dtype=torch.float64))


@torch.no_grad()
def test_a_position_that_all_look_at_receives_everything():
    """The bias table sends every query of a window to its own position: each receives one equal share, alike."""
    attention, queries = build_attention(is_global=False)
    attention.qkv.weight.zero_()
    attention.qkv.bias.zero_()
    attention.bias_table.zero_()
    attention.bias_table[12] = 99  # no offset
    torch.testing.assert_close(
        receive(attention, torch.randn(1, 3, 3, 8, dtype=torch.float64), queries),
        torch.ones(1, 3, 3, dtype=torch.float64),
    )
    attention.bias_table.zero_()
    attention.bias_table[:5] = 99  # queries two rows above their keys: they have no such key, or one of the last row
    received = receive(attention, torch.randn(1, 3, 3, 8, dtype=torch.float64), queries)[0]
    # The three queries of row 0 attend to row 2 alone, the six others to all nine positions alike.
    expected = torch.tensor([2 / 3, 2 / 3, 5 / 3], dtype=torch.float64)[:, None].expand(3, 3)
    torch.testing.assert_close(received, expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_any_kind_and_shape_of_picture_is_drawn(tmp_path, mode, crop_mode):
    model = create_model("gc_vit_xxtiny", img_size=(64, 96), **SHAPE)
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    picture = open_image(path, model, replace(XXTINY, crop_mode=crop_mode))
    assert (picture.mode, picture.size) == ("RGB", (96, 64))
    maps = find_attention(model, picture)
    assert [tuple(stage.local.shape) for stage in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert all(not torch.equal(stage.local, stage.global_) for stage in maps[:3])
    drawing = draw(picture, maps, "title")
    assert drawing.width > 5 * 224
    assert np.asarray(drawing).std() > 20


def test_the_crop_is_the_centre(tmp_path):
    model = create_model("gc_vit_xxtiny", img_size=32, **SHAPE)
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert np.asarray(open_image(tmp_path / "wide.png", model, XXTINY)).min() == 255
    assert np.asarray(open_image(tmp_path / "wide.png", model, replace(XXTINY, crop_mode="squash"))).min() == 0


def test_the_crop_is_evaluations(tmp_path):
    """Of 80 positions a crop_pct of 0.5 leaves the inner 40."""
    model = create_model("gc_vit_xxtiny", img_size=40, **SHAPE)
    Image.fromarray(np.tile(np.arange(80, dtype=np.uint8), (80, 1))).save(tmp_path / "ramp.png")
    crop = np.asarray(open_image(tmp_path / "ramp.png", model, replace(XXTINY, crop_pct=0.5)))
    assert np.array_equal(crop, np.tile(np.arange(20, 60)[:, None], (40, 1, 3)))


def test_deep_grey_is_scaled_and_not_clipped(tmp_path):
    model = create_model("gc_vit_xxtiny", img_size=32, **SHAPE)
    Image.fromarray(np.full((32, 32), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    assert (np.asarray(open_image(tmp_path / "deep.png", model, XXTINY)) == 0x80).all()


def test_weights_in_half_precision_are_drawn(tmp_path):
    state = {name: value.bfloat16() for name, value in create_model("gc_vit_xxtiny").state_dict().items()}
    torch.save(state, tmp_path / "bf16.pth")
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
    draw_file(tmp_path / "black.png", "gc_vit_xxtiny", str(tmp_path / "bf16.pth"), tmp_path / "out.png")
    assert (tmp_path / "out.png").exists()


def test_more_attention_is_brighter():
    grey = color(np.linspace(0, 5, 50)).astype(int) @ [299, 587, 114]
    assert (np.diff(grey) >= 0).all()
    assert grey[0] < 5000 < 200_000 < grey[-1]


def test_what_cannot_be_drawn(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    torch.save(create_model("gc_vit_xxtiny").state_dict(), tmp_path / "weights.pth")
    for image in ("text.jpg", "absent.jpg"):
        with pytest.raises(UserError, match=image):
            draw_file(tmp_path / image, "gc_vit_xxtiny", str(tmp_path / "weights.pth"), tmp_path / "out.png")
    with pytest.raises(UserError, match="did you mean gc_vit_tiny"):
        draw_file(tmp_path / "text.jpg", "gc_vit_tinyy", None, tmp_path / "out.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
    with pytest.raises(UserError, match="cannot write"):
        draw_file(tmp_path / "black.png", "gc_vit_xxtiny", str(tmp_path / "weights.pth"), tmp_path / "no/out.png")
    with pytest.raises(UserError, match=r"weights\.pth"):
        draw_file(tmp_path / "black.png", "gc_vit_tiny", str(tmp_path / "weights.pth"), tmp_path / "out.png")
    assert not list(tmp_path.glob("out*"))
