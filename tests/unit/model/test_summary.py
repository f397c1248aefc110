"""The table of stages: every row counted on the model, and nothing counted twice."""

import itertools
import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from gcvit.errors import UserError
from gcvit.model import VARIANTS, create_model
from gcvit.model.summary import format_table, main, summarize

QUICK = ("gc_vit_xxtiny", "gc_vit_base", "gc_vit_large_512")
SMALL = {"width": 16, "depths": [2, 3, 2, 2], "num_heads": [1, 2, 4, 8], "attention": "reference"}


def summarize_variant(name: str, **options):
    with torch.device("meta"):
        return summarize(create_model(name, attention="reference", **options))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VARIANTS]
)
def test_rows_add_up_to_what_is_known_of_the_model(name):
    *parts, whole = summarize_variant(name)
    variant = VARIANTS[name]
    assert [row.name for row in parts] == ["stem", "stage 1", "stage 2", "stage 3", "stage 4", "head"]
    assert sum(row.num_params for row in parts) == whole.num_params == variant.num_params
    assert sum(row.gmacs for row in parts) == pytest.approx(whole.gmacs, rel=1e-9)
    assert whole.gmacs == pytest.approx(variant.counted_gmacs, abs=5e-4)
    assert sum(row.activations for row in parts) == whole.activations
    for row in parts[1:5]:
        for column in ("num_params", "gmacs", "activations"):
            assert sum(getattr(part, column) for part in row.parts) == pytest.approx(getattr(row, column), rel=1e-9)
    assert [part.name for part in parts[1].parts] == ["queries", "blocks"]
    assert [part.name for part in parts[2].parts] == ["downsample", "queries", "blocks"]
    dim = 8 * variant.width
    assert parts[5].num_params == 2 * dim + (dim + 1) * 1000
    assert parts[5].gmacs == pytest.approx(dim * 1000 / 1e9)
    for row, window, depth in zip(parts[1:5], variant.windows, variant.depths, strict=True):
        assert (row.window, row.depth) == (window, depth)
        assert row.num_windows * window**2 == row.map_size[0] * row.map_size[1]


def test_activations_are_those_of_a_real_pass():
    """What a pass of one image keeps, measured on real tensors."""
    model = create_model("gc_vit_xxtiny", img_size=64, drop_path_rate=0.0, **SMALL).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def measure(num_images: int) -> int:
        kept: dict[int, tuple[int, torch.UntypedStorage]] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size(), storage
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.randn(num_images, 3, 64, 64))
        return sum(numel for numel, _ in kept.values())

    with torch.device("meta"):
        *_, whole = summarize(create_model("gc_vit_xxtiny", img_size=64, drop_path_rate=0.0, **SMALL))
    assert whole.activations == measure(1)


def test_rectangles_and_windows_beyond_the_map():
    rows = {row.name: row for row in summarize_variant("gc_vit_xxtiny", img_size=(224, 320))}
    assert (rows["stage 1"].map_size, rows["stage 1"].num_windows) == ((56, 80), 8 * 12)
    assert (rows["stage 4"].map_size, rows["stage 4"].num_windows) == ((7, 10), 2)


def test_the_table_has_a_line_for_each_row():
    rows = summarize_variant("gc_vit_xxtiny")
    lines = format_table(rows).splitlines()
    assert len({len(line) for line in lines[1:-1]}) == 1
    shown = itertools.chain.from_iterable((row, *row.parts) for row in rows)
    for row, line in zip(shown, lines[1:-1], strict=True):
        assert line.strip().startswith(row.name)
        assert f"{row.num_params:,}" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "a.pth", "--out", "b.png"], "the table has no use for: got --checkpoint, --out"),
        (["--attention", "a.jpg", "--img-size", "384", "--json"], "the drawing has no use for: got --img-size, --json"),
        (["--attention", "a.jpg", "--num-classes", "0"], "the drawing has no use for: got --num-classes"),
        (["--num-classes", "-1"], "--num-classes: got -1"),
    ],
)
def test_options_without_effect_are_refused(words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["summary", "gc_vit_xxtiny", *words])
    with pytest.raises(UserError, match=message):
        main()
