"""The table of variants, `create_model` and the registration with timm."""

import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from gcvit.errors import UserError
from gcvit.model import VARIANTS, create_model

DEMO: dict[str, Any] = {"width": 32, "depths": [2, 2, 4, 2], "num_heads": [1, 2, 4, 8], "img_size": 64}


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_are_consistent(name: str) -> None:
    row = VARIANTS[name]
    assert row.windows == tuple(row.img_size // ratio for ratio in (32, 32, 16, 32))
    assert {row.width * 2**i // heads for i, heads in enumerate(row.num_heads)} == {32}
    assert row.weights_file.startswith("gcvit_21k" if row.img_size > 224 else "gcvit_1k")


@pytest.mark.parametrize("name", VARIANTS)
def test_timm_knows_every_variant(name: str) -> None:
    row = VARIANTS[name]
    assert timm.is_model(name)
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7)
    assert (model.num_classes, model.num_features) == (7, row.width * 8)
    cfg = model.default_cfg
    assert (cfg["hf_hub_id"], cfg["hf_hub_filename"]) == ("nvidia/GCViT", row.weights_file)
    assert (cfg["input_size"], cfg["crop_pct"], cfg["crop_mode"]) == (
        (3, row.img_size, row.img_size),
        row.crop_pct,
        row.crop_mode,
    )


def test_the_package_alone_loads_no_torch() -> None:
    code = "import sys, gcvit; assert not {'torch', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_demo_model() -> None:
    model = create_model("gc_vit_xxtiny", num_classes=10, **DEMO)
    assert [stage.blocks[0].attention.window for stage in model.stages] == [2, 2, 4, 2]
    assert [stage.query_generator.num_poolings for stage in model.stages] == [3, 2, 0, 0]
    assert [len(stage.query_generator.fused) for stage in model.stages] == [3, 2, 1, 1]
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_drop_path_rises_linearly_to_the_variants_rate() -> None:
    with torch.device("meta"):
        published, given = create_model("gc_vit_tiny2"), create_model("gc_vit_tiny2", drop_path_rate=0.4)
    for model, last in ((published, 0.25), (given, 0.4)):
        rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
        assert rates == pytest.approx([last * i / 40 for i in range(41)])


@pytest.mark.parametrize("name", VARIANTS)
def test_layer_decay_falls_block_by_block(name: str) -> None:
    """Through timm's own parameter groups: the head learns at full rate, each block below it at half of the next."""
    with torch.device("meta"):
        model = create_model(name)
    groups = param_groups_layer_decay(
        model, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
    )
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[key] for key in found} == set(names.values())
    depths = VARIANTS[name].depths
    for key, (scale, weight_decay) in found.items():
        # The stem is layer 0; a stage's downsampler and queries go with its first block, the norm with the last one.
        match names[key].split("."):
            case ["stem", *_]:
                layer = 0
            case ["stages", stage, "blocks", block, *_]:
                layer = 1 + sum(depths[: int(stage)]) + int(block)
            case ["stages", stage, "downsample" | "query_generator", *_]:
                layer = 1 + sum(depths[: int(stage)])
            case ["norm", _]:
                layer = sum(depths)
            case ["head", *_]:
                layer = 1 + sum(depths)
        assert scale == 0.5 ** (1 + sum(depths) - layer), names[key]
        is_weight = names[key].endswith(".weight") and "norm" not in names[key]
        assert weight_decay == (0.1 if is_weight else 0.0), names[key]


@pytest.mark.parametrize("img_size", [64, 96, 224, 256, 384, 512])
def test_windows_scale_with_the_image(img_size: int) -> None:
    with torch.device("meta"):
        model = create_model("gc_vit_xxtiny", img_size=img_size).eval()
        logits = model(torch.empty(1, 3, img_size, img_size))
    windows = [stage.blocks[0].attention.window for stage in model.stages]
    assert windows == [img_size // ratio for ratio in (32, 32, 16, 32)]
    assert logits.shape == (1, 1000)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("gcvit_tiny", {}, "gc_vit_tiny?"),
        ("gc_vit_larg", {}, "gc_vit_large?"),
        ("gc_vit_tiny", {"widht": 32}, "width?"),
        ("gc_vit_tiny", {"window": [7, 7, 14, 7]}, "windows?"),
        ("gc_vit_tiny", {"img_size": 31}, "of 32 or more"),
        ("gc_vit_tiny", {"img_size": 0}, "of 32 or more"),
        ("gc_vit_tiny", {"img_size": (224, 31)}, "of 32 or more"),
        ("gc_vit_tiny", {"img_size": (224, 224, 3)}, "one number, or (height, width)"),
        ("gc_vit_tiny", {"windows": [7, 7, 14]}, "four positive numbers"),
        ("gc_vit_tiny", {"depths": [3, 4, 0, 5]}, "four positive numbers"),
        ("gc_vit_tiny", {"num_heads": [3, 4, 8, 16]}, "num_heads of stage 0 does not divide its 64 channels"),
    ],
)
def test_mistakes_are_named(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        create_model(name, **arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("img_size", "windows"),
    [
        (300, [10, 10, 19, 10]),
        (336, [11, 11, 21, 11]),
        ((224, 448), [7, 7, 14, 7]),
        ((600, 800), [19, 19, 38, 19]),
        ((800, 600), [19, 19, 38, 19]),
    ],
)
def test_windows_are_rounded_up_and_follow_the_shorter_side(img_size: Any, windows: list[int]) -> None:
    with torch.device("meta"):
        model = create_model("gc_vit_xxtiny", img_size=img_size)
    assert [stage.blocks[0].attention.window for stage in model.stages] == windows
    # As many windows to the shorter side as at 224, so the weights of the query generators fit as well.
    assert [stage.query_generator.num_poolings for stage in model.stages] == [3, 2, 0, 0]


def test_given_windows_are_kept_and_pool_to_their_size() -> None:
    with torch.device("meta"):
        model = create_model("gc_vit_xxtiny", img_size=128, windows=[8, 4, 4, 4]).eval()
        model(torch.empty(1, 3, 128, 128))
    assert [stage.query_generator.num_poolings for stage in model.stages] == [2, 2, 1, 0]
