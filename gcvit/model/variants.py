"""List all GC ViT variants in one table, create models, and register the variants with timm."""

import difflib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from gcvit.errors import UserError
from gcvit.model import layouts
from gcvit.model.gcvit import GCViT, read_sides

HUB_REPOSITORY = "nvidia/GCViT"  # on Hugging Face; its weights are under CC-BY-NC-SA-4.0: not for commercial use


@dataclass(frozen=True)
class Variant:
    """Describe one published model: its architecture, its evaluation, and its published numbers.

    `num_params` and `counted_gmacs` (10^9 multiply-adds an image) are counted on the model. `published_*` are the
    authors' figures; where they differ, the model follows the authors' code. `published_top1` is ImageNet-1K validation
    accuracy in percent.
    """

    width: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratio: float
    layer_scale: float | None
    drop_path_rate: float
    crop_pct: float
    published_top1: float
    num_params: int
    counted_gmacs: float
    published_gmacs: float
    weights_file: str
    """The weights file in HUB_REPOSITORY."""
    img_size: int = 224
    windows: tuple[int, ...] = (7, 7, 14, 7)
    crop_mode: str = "center"
    weights_tag: str = "in1k"


# fmt: off
VARIANTS: dict[str, Variant] = {
    "gc_vit_xxtiny": Variant(
        64, (2, 2, 6, 2), (2, 4, 8, 16), 3.0, None, 0.2, crop_pct=1.0,
        published_top1=79.9, num_params=11_995_428, counted_gmacs=2.121, published_gmacs=2.1,
        weights_file="gcvit_1k_xxtiny.pth.tar"),
    "gc_vit_xtiny": Variant(
        64, (3, 4, 6, 5), (2, 4, 8, 16), 3.0, None, 0.2, crop_pct=0.875,
        published_top1=82.0, num_params=19_981_294, counted_gmacs=2.913, published_gmacs=2.6,
        weights_file="gcvit_1k_xtiny.pth.tar"),
    "gc_vit_tiny": Variant(
        64, (3, 4, 19, 5), (2, 4, 8, 16), 3.0, None, 0.2, crop_pct=1.0,
        published_top1=83.5, num_params=28_221_974, counted_gmacs=4.761, published_gmacs=4.7,
        weights_file="gcvit_1k_tiny.pth.tar"),
    "gc_vit_tiny2": Variant(
        64, (3, 4, 29, 5), (2, 4, 8, 16), 3.0, None, 0.25, crop_pct=0.875,
        published_top1=83.7, num_params=34_535_654, counted_gmacs=6.178, published_gmacs=5.5,
        weights_file="gcvit_1k_tiny2.pth.tar"),
    "gc_vit_small": Variant(
        96, (3, 4, 19, 5), (3, 6, 12, 24), 2.0, 1e-5, 0.3, crop_pct=0.875,
        published_top1=84.3, num_params=51_092_173, counted_gmacs=8.530, published_gmacs=8.5,
        weights_file="gcvit_1k_small.pth.tar"),
    "gc_vit_small2": Variant(
        96, (3, 4, 23, 5), (3, 6, 12, 24), 3.0, 1e-5, 0.35, crop_pct=0.875,
        published_top1=84.8, num_params=68_615_197, counted_gmacs=11.538, published_gmacs=10.7,
        weights_file="gcvit_1k_small2.pth.tar"),
    "gc_vit_base": Variant(
        128, (3, 4, 19, 5), (4, 8, 16, 32), 2.0, 1e-5, 0.5, crop_pct=1.0,
        published_top1=85.0, num_params=90_320_836, counted_gmacs=14.816, published_gmacs=14.8,
        weights_file="gcvit_1k_base.pth.tar"),
    "gc_vit_large": Variant(
        192, (3, 4, 19, 5), (6, 12, 24, 48), 2.0, 1e-5, 0.5, crop_pct=1.0,
        published_top1=85.7, num_params=202_075_570, counted_gmacs=32.555, published_gmacs=32.6,
        weights_file="gcvit_1k_large.pth.tar"),
    "gc_vit_large_384": Variant(
        192, (3, 4, 19, 5), (6, 12, 24, 48), 2.0, 1e-5, 0.1, crop_pct=1.0,
        published_top1=87.4, num_params=202_860_610, counted_gmacs=103.943, published_gmacs=120.4,
        weights_file="gcvit_21k_large_384.pth.tar", img_size=384, windows=(12, 12, 24, 12),
        crop_mode="squash", weights_tag="in21k_ft_in1k"),
    "gc_vit_large_512": Variant(
        192, (3, 4, 19, 5), (6, 12, 24, 48), 2.0, 1e-5, 0.1, crop_pct=1.0,
        published_top1=87.6, num_params=203_795_362, counted_gmacs=202.137, published_gmacs=245.0,
        weights_file="gcvit_21k_large_512.pth.tar", img_size=512, windows=(16, 16, 32, 16),
        crop_mode="squash", weights_tag="in21k_ft_in1k"),
}
# fmt: on


def create_model(
    name: str,
    num_classes: int = 1000,
    img_size: int | Sequence[int] | None = None,
    drop_path_rate: float | None = None,
    *,
    pretrained: bool = False,
    **overrides: Any,
) -> GCViT:
    """Create a GC ViT with initial weights, or without weights under `torch.device("meta")`.

    Args:
        img_size: One number, or height and width; by default the variant's. At another size the windows scale with the
            shorter side, rounded up, unless they are given.
        drop_path_rate: By default the variant's.
        pretrained: Load the published weights, see `fetch_weights`, with bias tables resampled to the windows, and
            print a line about them to stderr. With another number of classes than 1000 the head has its initial
            weights.
        overrides: Further arguments of `GCViT` (width, depths, num_heads, mlp_ratio, layer_scale, windows, ...), which
            replace the variant's.

    Raises:
        UserError: The name or an override is unknown (the hint has the nearest valid one), or the published weights do
            not fit the overrides.
    """
    find_variant(name)
    allowed = list(inspect.signature(GCViT).parameters)
    for override in overrides:
        _check_name(f"unknown override of {name}", override, allowed)
    given = {"img_size": img_size, "drop_path_rate": drop_path_rate}
    overrides |= {key: value for key, value in given.items() if value is not None}
    model: GCViT = _build(name, num_classes=num_classes, **overrides)
    if pretrained:
        found = layouts.load(model, fetch_weights(name), reset_head=num_classes != 1000, resample=True)
        print(found, file=sys.stderr, flush=True)
    return model


def find_variant(name: str) -> Variant:
    """Return the row of `VARIANTS` with this name.

    Raises:
        UserError: The name is unknown; the hint has the nearest one.
    """
    _check_name("unknown model", name, list(VARIANTS))
    return VARIANTS[name]


def _check_name(what: str, name: str, expected: list[str]) -> None:
    if name not in expected:
        near = difflib.get_close_matches(name, expected, n=1)
        raise UserError(what, got=name, expected=", ".join(expected), hint=f"did you mean {near[0]}?" if near else None)


def _build(name: str, pretrained: bool = False, **arguments: Any) -> Any:
    """Build the model by timm, which attaches configs, loads pretrained weights and wraps feature extraction."""
    row = VARIANTS[name]
    img_size = arguments.pop("img_size", row.img_size)
    published = {
        "width": row.width,
        "depths": row.depths,
        "num_heads": row.num_heads,
        "mlp_ratio": row.mlp_ratio,
        "layer_scale": row.layer_scale,
        "windows": scale_windows(row, min(read_sides(img_size))),
        "drop_path_rate": row.drop_path_rate,
        # A classifier is only good at the size it was built for; a backbone must take what a detector gives.
        "dynamic_img_size": arguments.get("features_only", False),
    }
    return build_model_with_cfg(
        GCViT,
        name,
        pretrained,
        pretrained_filter_fn=layouts.to_fitting,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        img_size=img_size,
        **(published | arguments),
    )


def scale_windows(row: Variant, side: int) -> list[int]:
    """Compute the windows of a variant for images whose shorter side is `side`: as many per side as at its own size."""
    # Rounded up: the last windows then end beyond the map, where rounding down would need one more for the rest.
    return [math.ceil(window * side / row.img_size) for window in row.windows]


def _describe(row: Variant) -> dict[str, Any]:
    """Return timm's config of a variant: the preparation of its images and the place of its weights."""
    map_side = row.img_size // 32
    return {
        "hf_hub_id": HUB_REPOSITORY,
        "hf_hub_filename": row.weights_file,
        "license": "cc-by-nc-sa-4.0",
        "input_size": (3, row.img_size, row.img_size),
        "fixed_input_size": True,
        "pool_size": (map_side, map_side),
        "crop_pct": row.crop_pct,
        "crop_mode": row.crop_mode,
        "interpolation": "bicubic",
        "first_conv": "stem.conv",
        "classifier": "head.fc",
    }


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def build_variant(pretrained: bool = False, **arguments: Any) -> nn.Module:
        return _build(name, pretrained, **arguments)

    build_variant.__name__ = name  # timm registers a function under its own name
    return build_variant


default_cfgs = generate_default_cfgs({f"{name}.{row.weights_tag}": _describe(row) for name, row in VARIANTS.items()})
for _name in VARIANTS:
    register_model(_entrypoint(_name))


def fetch_weights(name: str) -> str:
    """Return the path of a variant's published weights; download them to Hugging Face's cache if they are not there.

    Weights in the cache are used without a request to the hub. A download shows its progress and the weights' licence.

    Raises:
        UserError: The hub cannot be reached.
    """
    file = VARIANTS[name].weights_file
    cached = try_to_load_from_cache(HUB_REPOSITORY, file)
    if isinstance(cached, str):
        return cached
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the other processes of a node wait for this one's download
        notice = f"{file} of {HUB_REPOSITORY} is published under CC-BY-NC-SA-4.0: not for commercial use"
        print(notice, file=sys.stderr, flush=True)
    try:
        return hf_hub_download(HUB_REPOSITORY, file)
    except Exception as error:  # the hub's client lets those of its network library through, whichever it has
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"cannot fetch the published weights of {name}",
            got=reason,
            hint=f"download {file} of {HUB_REPOSITORY} yourself, and give its path",
        ) from None
