"""Bias tables for windows of another size, against timm's two ways and against a law that is known everywhere."""

import pytest
import torch
from timm.layers import resize_rel_pos_bias_table, resize_rel_pos_bias_table_simple
from torch import Tensor

from gcvit.model.fitting import resample_bias_table, window_of

STEPS = [(7, 12), (14, 24), (12, 16), (24, 32), (7, 16), (12, 7)]


def smooth_table(window: int) -> Tensor:
    """Two heads, each a function of the offset's share of a window."""
    share = torch.arange(1 - window, window, dtype=torch.float64) / window
    y, x = share[:, None], share[None, :]
    near, leaning = torch.exp(-2 * (y**2 + x**2)), torch.sin(y) - 0.5 * x
    return torch.stack([near, leaning], dim=-1).flatten(0, 1)


@pytest.mark.parametrize(("old", "new"), STEPS)
def test_offsets_keep_their_share_of_the_window(old: int, new: int) -> None:
    table, expected = smooth_table(old), smooth_table(new)
    resampled = resample_bias_table(table, new)
    assert window_of(resampled.shape) == new
    assert (resampled - expected).norm() < 0.08 * expected.norm()
    centre, new_centre = (2 * old - 1) ** 2 // 2, (2 * new - 1) ** 2 // 2
    torch.testing.assert_close(resampled[new_centre], table[centre])  # offset zero is offset zero


@pytest.mark.parametrize(("old", "new"), STEPS)
def test_resampling_is_timms_bicubic(old: int, new: int) -> None:
    table = torch.randn((2 * old - 1) ** 2, 3, generator=torch.Generator().manual_seed(old))
    shape = ((2 * new - 1) ** 2, 3)
    assert torch.equal(resample_bias_table(table, new), resize_rel_pos_bias_table_simple(table, (new, new), shape))


@pytest.mark.parametrize(("old", "new"), [step for step in STEPS if step[0] < step[1]])
@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")
def test_resampling_resembles_timms_geometric_one(old: int, new: int) -> None:
    """`resize_rel_pos_bias_table` keeps near offsets in positions and stretches far ones: alike, not the same."""
    table = smooth_table(old).float()
    ours, theirs = (
        resample_bias_table(table, new),
        resize_rel_pos_bias_table(table, (new, new), ((2 * new - 1) ** 2, 2)),
    )
    for head in range(2):
        pair = torch.stack([ours[:, head], theirs[:, head]])
        assert torch.corrcoef(pair)[0, 1] > 0.9
        assert pair[0].argmax() == pair[1].argmax()
        torch.testing.assert_close(pair[0, [0, -1]], pair[1, [0, -1]], rtol=0, atol=0.03)  # the farthest offsets


def test_the_dtype_is_kept_and_the_same_window_changes_nothing() -> None:
    table = torch.randn(169, 2).bfloat16()
    assert torch.equal(resample_bias_table(table, 7), table)
    assert resample_bias_table(table, 12).dtype == torch.bfloat16
    expected = resample_bias_table(table.float(), 12).bfloat16()
    assert torch.equal(resample_bias_table(table, 12), expected)
