"""FLOPs against counts by hand, and against the table of variants."""

import pytest
import torch
from torch import nn

from gcvit.model import VARIANTS, create_model
from gcvit.model.flops import count_forward_flops

TINY = {"width": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "num_classes": 10, "img_size": 32}


class _Small(nn.Module):
    """A convolution of 3 to 4 channels, 3 x 3, then 4 to 5 numbers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


def test_a_multiply_add_counts_two():
    assert count_forward_flops(_Small(), (32, 40)) == 2 * (32 * 40 * 4 * 3 * 9 + 4 * 5)


def test_the_variants_count_what_their_table_says():
    with torch.device("meta"):
        model = create_model("gc_vit_xxtiny")
    assert count_forward_flops(model, 224) / 2e9 == pytest.approx(VARIANTS["gc_vit_xxtiny"].counted_gmacs, abs=1e-3)


@pytest.mark.parametrize("attention", ["reference", "sdpa"])
def test_a_model_in_use_is_left_as_it_is_and_drop_path_counts_nothing_off(attention):
    plain = create_model("gc_vit_xxtiny", **TINY, attention="reference")
    used = create_model("gc_vit_xxtiny", **TINY, attention=attention, drop_path_rate=0.5, drop_path_skips=True).train()
    before = torch.random.get_rng_state()
    assert count_forward_flops(used, 32) == count_forward_flops(plain, 32)
    assert used.training
    assert all(p.device.type == "cpu" and p.grad is None for p in used.parameters())
    assert torch.equal(torch.random.get_rng_state(), before)
