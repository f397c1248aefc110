"""Images of any size: global queries from any map, sizes fixed at building or free at run time."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gcvit.errors import UserError
from gcvit.model import create_model
from gcvit.model.gcvit import GCViT, count_poolings
from gcvit.model.layers import QueryGenerator, average_sides

TINY: dict[str, Any] = {"width": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4], "num_classes": 3}


def build_model(**arguments: Any) -> GCViT:
    return create_model("gc_vit_xxtiny", **TINY | arguments).eval()


# Queries.


@pytest.mark.parametrize(
    ("height", "width", "window", "num_poolings"),
    [
        (56, 56, 7, 3),
        (28, 28, 7, 2),
        (14, 14, 14, 0),
        (84, 84, 11, 3),  # 42, 21, 11: halves are rounded up
        (150, 200, 19, 3),
        (56, 112, 7, 3),
        (27, 40, 14, 1),
        (26, 40, 14, 0),  # a half of 13 would hold no window
        (5, 20, 7, 0),
        (8, 8, 1, 3),
        (1, 1, 1, 0),
    ],
)
def test_queries_are_a_window_whatever_the_map(height: int, width: int, window: int, num_poolings: int) -> None:
    assert count_poolings(height, width, window) == num_poolings
    generator = QueryGenerator(4, num_poolings, window)
    assert len(generator.fused) == max(1, num_poolings)
    assert generator(torch.randn(2, height, width, 4)).shape == (2, window, window, 4)


@pytest.mark.parametrize(("height", "width", "sides"), [(16, 16, (4, 4)), (12, 12, (6, 6)), (3, 40, (3, 40))])
def test_a_map_of_another_size_is_pooled_while_a_window_fits(height: int, width: int, sides: tuple[int, int]) -> None:
    """Made for maps of 16 and windows of 4: two poolings."""
    generator, x = QueryGenerator(4, 2, 4), torch.randn(1, height, width, 4)
    pooled = x
    for fused in generator.fused:
        pooled = fused(pooled)
        if pooled.shape[1:3] != sides:
            pooled = F.max_pool2d(pooled.permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1)
    assert pooled.shape[1:3] == sides
    expected = average_sides(pooled, 4)
    queries = generator(x)
    assert torch.equal(queries[:, : expected.shape[1]], expected)
    assert not queries[:, expected.shape[1] :].any()


@given(height=st.integers(1, 20), width=st.integers(1, 20), size=st.integers(1, 9))
def test_averages_over_equal_shares(height: int, width: int, size: int) -> None:
    x = torch.randn(1, height, width, 2, dtype=torch.float64)
    # In the finest grid that positions and shares have in common, every share is whole.
    rows, columns = min(height, size), min(width, size)
    fine = x.repeat_interleave(rows, dim=1).repeat_interleave(columns, dim=2)
    expected = F.avg_pool2d(fine.permute(0, 3, 1, 2), (height, width)).permute(0, 2, 3, 1)
    torch.testing.assert_close(average_sides(x, size), expected)


def test_a_map_that_fits_is_left_alone() -> None:
    x = torch.randn(1, 5, 7, 2)
    assert average_sides(x, 7) is x


# Sizes.


@pytest.mark.parametrize("img_size", [33, 50, 64, (32, 96), (100, 47)])
def test_maps_have_strides_of_4_to_32(img_size: Any) -> None:
    model = build_model(img_size=img_size)
    height, width = model.input_size[1:]
    final, maps = model.forward_intermediates(torch.randn(2, 3, height, width))
    expected = [(2, 8 * 2**i, -(-height // 2 ** (i + 2)), -(-width // 2 ** (i + 2))) for i in range(4)]
    assert [tuple(x.shape) for x in maps] == expected
    assert model.forward_head(final).shape == (2, 3)


def test_other_sizes_are_refused_unless_all_are_taken() -> None:
    fixed, dynamic = build_model(img_size=64), build_model(img_size=64, dynamic_img_size=True)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(fixed(images), dynamic(images))
    for sides in ((64, 96), (47, 200), (32, 32)):
        images = torch.randn(1, 3, *sides)
        assert dynamic(images).isfinite().all()
        with pytest.raises(UserError, match=r"expected: \(batch, 3, 64, 64\); hint: .*dynamic_img_size"):
            fixed(images)
    for shape in ((1, 3, 31, 64), (1, 4, 64, 64)):
        with pytest.raises(UserError, match="wrong size"):
            dynamic(torch.randn(shape))


def test_feature_extraction_takes_any_size() -> None:
    arguments = dict(features_only=True, img_size=64, **TINY)
    features = timm.create_model("gc_vit_xxtiny", **arguments).eval()
    maps = features(torch.randn(1, 3, 70, 96))
    assert [tuple(x.shape[2:]) for x in maps] == [(18, 24), (9, 12), (5, 6), (3, 3)]
    fixed = timm.create_model("gc_vit_xxtiny", dynamic_img_size=False, **arguments)
    with pytest.raises(UserError, match="wrong size"):
        fixed(torch.randn(1, 3, 70, 96))
