"""Draw an image beside maps of its local and global attention, as in the GC ViT paper.

A tile shows how much attention each position receives from the queries of its window, averaged over heads and queries,
in the last local or the last global block of a stage. The attention of a window is normalized: 1 is an equal share.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from gcvit.errors import UserError
from gcvit.model.attention import WindowAttention, attend_windows, mask_missing, merge_windows
from gcvit.model.gcvit import GCViT, Stage
from gcvit.model.variants import VARIANTS, Variant, fetch_weights, find_variant
from gcvit.model.weights import read_model

TILE, GAP, LINE = 224, 12, 22  # pixels; LINE is a line of text
MOST = 4.0
"""The multiple of an equal share that has the brightest colour."""
# From black over red to bright yellow: the lightness rises too, for readers who see no colours.
COLORS = np.array([[0, 0, 8], [60, 10, 90], [150, 30, 80], [225, 80, 30], [250, 170, 20], [255, 250, 170]], np.float32)


@dataclass(frozen=True)
class AttentionMaps:
    """Hold the attention that each position of one stage's map receives, (H, W); 1 is an equal share of a window."""

    local: Tensor
    global_: Tensor


def draw_file(image: Path, name: str, checkpoint: str | None, out: Path) -> str:
    """Draw the attention of an image file into a PNG, and return a line about it.

    Args:
        checkpoint: A weights file of the variant `name`, or another variant's name; None is the variant's published
            weights.

    Raises:
        UserError: The file is no image, the weights do not fit, or the PNG cannot be written.
    """
    variant, source, path = find_variant(name), checkpoint or name, checkpoint or name
    if source in VARIANTS:
        variant, path = VARIANTS[source], fetch_weights(source)
    model, _, found = read_model(path, name, attention="reference")
    model.float()  # the weights may be in half precision; the pixels are not
    picture = open_image(image, model, variant)
    drawing = draw(picture, find_attention(model, picture), f"{name}: {image.name}")
    try:
        drawing.save(out, format="PNG")
    except OSError as error:
        raise UserError(
            "cannot write the drawing", got=f"{out} ({error.strerror})", hint="give another --out"
        ) from None
    return f"{found}\n{out}: attention of {image}"


def open_image(path: Path, model: GCViT, variant: Variant) -> Image.Image:
    """Load an image file in RGB at the model's input size, squashed or cropped at the centre, as in the evaluation.

    Raises:
        UserError: The file is no image.
    """
    _, height, width = model.input_size
    try:
        with Image.open(path) as file:
            # Pillow's own conversion clips 16-bit grey at 255.
            is_deep = file.mode.startswith("I;16")
            image = (Image.fromarray((np.asarray(file) >> 8).astype(np.uint8)) if is_deep else file).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError("not an image that can be read", got=f"{path} ({error})") from None
    if variant.crop_mode != "squash":
        scale = max(width / image.width, height / image.height) / variant.crop_pct
        inner = (width / scale, height / scale)
        left, top = (image.width - inner[0]) / 2, (image.height - inner[1]) / 2
        box = (left, top, left + inner[0], top + inner[1])
        return image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return image.resize((width, height), Image.Resampling.BICUBIC)


@torch.no_grad()
def find_attention(model: GCViT, image: Image.Image) -> list[AttentionMaps]:
    """Compute the maps of each stage for an image of the model's input size. The model's weights are in fp32."""
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    pixels = (torch.from_numpy(np.array(image)).float() / 255 - mean) / std
    attentions = []
    for stage in model.stages:
        assert isinstance(stage, Stage)
        of_stage = [module for module in stage.modules() if isinstance(module, WindowAttention)]
        # The last block of each kind.
        attentions += [[m for m in of_stage if m.uses_global_queries == kind][-1] for kind in (False, True)]
    with _watched(attentions) as received:
        model.eval()(pixels.permute(2, 0, 1)[None])
    found = [received[attention][0] for attention in attentions]
    return [AttentionMaps(*pair) for pair in zip(found[::2], found[1::2], strict=True)]


@contextmanager
def _watched(attentions: list[WindowAttention]) -> Iterator[dict[WindowAttention, Tensor]]:
    """Record the received attention (B, H, W) of these modules while the model runs in the block."""
    received: dict[WindowAttention, Tensor] = {}

    def see(attention: WindowAttention, inputs: tuple[Tensor, Tensor]) -> None:
        received[attention] = receive(attention, *inputs)

    hooks = [attention.register_forward_pre_hook(see) for attention in attentions]
    try:
        yield received
    finally:
        for hook in hooks:
            hook.remove()


def receive(attention: WindowAttention, x_bhwc: Tensor, queries_bwwc: Tensor) -> Tensor:
    """Compute the attention that each position receives, averaged over heads and queries; 1 is an equal share.

    Positions of a window beyond the map receive nothing. As local queries they are not counted.

    Returns:
        (B, H, W).
    """
    height, width = x_bhwc.shape[1:3]
    window = attention.window
    missing_yx = (-height % window, -width % window)
    kept: list[Tensor] = []
    queries = queries_bwwc if attention.uses_global_queries else None
    parts, table, heads = attention.qkv(x_bhwc), attention.bias_table, attention.num_heads
    attend_windows(parts, queries, table, window, heads, attention.scale, partial(_attend_and_keep, kept))
    (weights_bnhqk,) = kept
    exist_n11k = (mask_missing(missing_yx, height, width, window, weights_bnhqk) == 0).to(weights_bnhqk.dtype)
    # Global queries are those of a whole window, also at the map's end.
    asked_n1q1 = torch.ones_like(exist_n11k) if attention.uses_global_queries else exist_n11k
    asked_n1q1 = (asked_n1q1 / asked_n1q1.sum(-1, keepdim=True)).transpose(-2, -1)
    shares_bn1qk = weights_bnhqk.mean(2, keepdim=True) * asked_n1q1 * exist_n11k.sum(-1, keepdim=True)
    shares_bn1k1 = shares_bn1qk.sum(-2, keepdim=True).transpose(-2, -1)
    received = merge_windows(shares_bn1k1, window, height + missing_yx[0], width + missing_yx[1])
    return received[:, :height, :width, 0]


def _attend_and_keep(kept: list[Tensor], q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Compute `attend`, and store its weights (B, n, h, N, N)."""
    kept.append(((q * scale) @ k.transpose(-2, -1) + bias).softmax(-1))
    return kept[-1] @ v


def draw(image: Image.Image, maps: list[AttentionMaps], title: str) -> Image.Image:
    """Draw the image on the left, then a column for each stage: local attention above, global below."""
    tile = (round(TILE * image.width / max(image.size)), round(TILE * image.height / max(image.size)))
    step = (tile[0] + GAP, tile[1] + GAP)
    top = GAP + 2 * LINE + 6
    size = (GAP + step[0] * (1 + len(maps)), top + 2 * (step[1] + LINE))
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    pen.text((GAP, GAP - 2), title, fill="black", font=ImageFont.load_default(18))
    canvas.paste(image.resize(tile), (GAP, top))
    for column, stage in enumerate(maps, start=1):
        height, width = stage.local.shape
        left = GAP + column * step[0]
        pen.text((left, top - LINE), f"stage {column}: {height} x {width}", fill="black", font=font)
        for row, (kind, received) in enumerate((("local", stage.local), ("global", stage.global_))):
            at = (left, top + row * (step[1] + LINE))
            canvas.paste(blend(image.resize(tile), received), at)
            pen.text((left, at[1] + tile[1] + 2), kind, fill="black", font=font)
    bar, below = Image.fromarray(color(np.linspace(0, MOST, tile[0])[None].repeat(12, 0))), top + tile[1] + LINE
    canvas.paste(bar, (GAP, below))
    for share, x in ((0, 0), (1, tile[0] / MOST), (MOST, tile[0])):
        anchor = {0: "la", MOST: "ra"}.get(share, "ma")
        pen.text((GAP + x, below + 15), f"{share:g}", fill="black", font=font, anchor=anchor)
    for line, text in enumerate(("attention received by", "a position: 1 is an equal", "share in its window")):
        pen.text((GAP, below + 38 + line * LINE), text, fill="black", font=font)
    return canvas


def blend(image: Image.Image, received: Tensor) -> Image.Image:
    """Blend the colours of a map (H, W) with the greys of the image."""
    grey = np.asarray(image.convert("L"), np.float32)[..., None]
    large = Image.fromarray(received.float().numpy()).resize(image.size, Image.Resampling.NEAREST)
    return Image.fromarray((0.3 * grey + 0.7 * color(np.asarray(large))).astype(np.uint8))


def color(shares: np.ndarray) -> np.ndarray:
    """Convert shares of any shape to colours (..., 3), uint8, by their square root: most are near zero."""
    place = np.sqrt(np.clip(shares / MOST, 0, 1)) * (len(COLORS) - 1)
    below = np.minimum(place.astype(int), len(COLORS) - 2)
    part = (place - below)[..., None]
    return (COLORS[below] * (1 - part) + COLORS[below + 1] * part).astype(np.uint8)
