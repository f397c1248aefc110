"""The gated convolution, and drop path that leaves out what it drops, against their definitions."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gcvit.model import GCViT, create_model
from gcvit.model.layers import Block, DropPath, GatedPointwise, SqueezeExcite, add_to_some
from gcvit.parallel.activation_checkpointing import recompute_parts


@pytest.mark.parametrize("side", [2, 4])
def test_a_gate_on_the_weights_is_a_gate_on_the_map(side: int) -> None:
    """By the map's size one or the other is scaled: 2 x 2 positions are fewer than 6 channels, 4 x 4 are more."""
    x = torch.randn(3, side, side, 6, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(3, 1, 1, 6, dtype=torch.float64, requires_grad=True)
    convolution = GatedPointwise(6).double()
    wanted = (x, gate, convolution.weight)
    expected = torch.einsum("bhwi,bi,oi->bhwo", x, gate[:, 0, 0], convolution.weight[:, :, 0, 0])
    out = convolution(x, gate)
    torch.testing.assert_close(out, expected)
    for got, exact in zip(
        torch.autograd.grad(out.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(got, exact)


def test_the_mean_of_a_large_map_does_not_overflow_in_fp16() -> None:
    squeeze_excite = SqueezeExcite(8)
    x = torch.full((1, 112, 112, 8), 8.0)
    gate = squeeze_excite.half()(x.half())
    torch.testing.assert_close(gate.float(), squeeze_excite.float()(x), rtol=1e-2, atol=1e-2)


def test_drop_path_drops_images_and_keeps_the_mean() -> None:
    x = torch.randn(20_000, 1, 1, 2, dtype=torch.float64)
    drop_path = DropPath(0.3)
    torch.manual_seed(0)
    factors = drop_path(x) / x
    kept = 1 / (1 - 0.3)
    assert torch.equal(factors[..., 0] > 0, factors[..., 1] > 0)
    torch.testing.assert_close(factors, torch.where(factors > 0, kept, 0.0).double(), rtol=1e-6, atol=0)
    # An image's factor has the standard deviation sqrt(3/7): of 20,000 the mean's is 0.005.
    assert factors.mean().item() == pytest.approx(1, abs=0.02)
    assert drop_path.eval()(x) is x


def test_some_images_are_added_to_and_in_the_mean_all() -> None:
    """Of 5 images at a rate of 0.4, 3 are kept, and what they get is 5/3 of it."""
    x, others = torch.randn(2, 5, 2, dtype=torch.float64).unbind(0)
    added = 3 * x + others
    seen = []

    def branch(x: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return 3 * x + others

    torch.manual_seed(0)
    draws = torch.stack([add_to_some(branch, 0.4, x, others) for _ in range(4000)])
    assert set(seen) == {3}
    factors = ((draws - x) / added).mean(dim=2)  # of each draw and image
    is_kept = factors > 1
    assert (is_kept.sum(dim=1) == 3).all()
    torch.testing.assert_close(factors, is_kept * torch.tensor(5 / 3, dtype=torch.float64))
    # An image's factor has the standard deviation sqrt(2/3): over 4000 draws the mean's is 0.013.
    torch.testing.assert_close(factors.mean(dim=0), torch.ones(5, dtype=torch.float64), rtol=0, atol=0.06)


@pytest.mark.parametrize(("rate", "num_images", "num_kept"), [(0.5, 8, 4), (0.9, 2, 1), (0.05, 4, 4), (0.0, 3, 3)])
def test_what_is_dropped_is_not_computed(rate: float, num_images: int, num_kept: int) -> None:
    settings = {"uses_global_queries": True, "mlp_ratio": 2.0, "layer_scale": 0.5, "drop_path_rate": rate}
    block = Block(8, 2, 2, **settings, drop_path_skips=True)

    def count_flops(num_images: int) -> int:
        with FlopCounterMode(display=False) as counter:
            block(torch.randn(num_images, 4, 4, 8), torch.randn(num_images, 2, 2, 8)).sum().backward()
        return counter.get_total_flops()

    flops = count_flops(num_images)
    block.eval()
    assert flops == count_flops(num_kept) > 0


def build(skips: bool, recomputation: str = "none") -> GCViT:
    sizes = {"width": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2), "windows": (4, 2, 2, 1)}
    model = create_model("gc_vit_xxtiny", 4, 32, drop_path_rate=0.6, drop_path_skips=skips, **sizes)
    recompute_parts(model, recomputation)
    return model


def test_skipping_changes_training_alone() -> None:
    images = torch.randn(4, 3, 32, 32)
    plain, skipping = build(skips=False), build(skips=True)
    assert not torch.equal(plain(images), skipping(images))
    assert torch.equal(plain.eval()(images), skipping.eval()(images))


@pytest.mark.parametrize("recomputation", ["selective", "blocks", "full"])
def test_recomputation_keeps_the_same_images(recomputation: str) -> None:
    images = torch.randn(6, 3, 32, 32)
    gradients = []
    for mode in ("none", recomputation):
        model = build(skips=True, recomputation=mode)
        torch.manual_seed(1)
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])
