"""The model against timm's own through the weight map: logits and every gradient, at batch sizes 1 and 4."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from gcvit.model import create_model, weights
from gcvit.model.gcvit import GCViT

CASES = [
    pytest.param("gc_vit_xxtiny", "gcvit_xxtiny", 64, id="xxtiny at 64"),
    pytest.param("gc_vit_small", "gcvit_small", 64, id="small at 64"),
    pytest.param("gc_vit_xxtiny", "gcvit_xxtiny", 224, id="xxtiny at 224"),
    pytest.param("gc_vit_small", "gcvit_small", 224, id="small at 224", marks=pytest.mark.slow),
]


def build_pair(ours: str, theirs: str, img_size: int, **arguments: Any) -> tuple[GCViT, nn.Module]:
    """Our model and timm's with the same float64 weights, none of which is too small to be noticed."""
    model = create_model(ours, img_size=img_size, drop_path_rate=0.0, **arguments).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            if name.endswith("bias_table"):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif "gamma" in name:
                parameter.copy_(0.5 + 0.1 * noise)
            else:
                parameter.add_(0.1 * noise)
    other = timm.create_model(theirs, img_size=img_size, **arguments).double()
    other.load_state_dict(weights.to_timm_state(model.state_dict()))
    for module in other.modules():
        if hasattr(module, "rel_pos"):
            # timm's scale is d^-0.5 in double precision, the official one and ours is rounded to fp32.
            assert module.scale == pytest.approx(model.stages[0].blocks[0].attention.scale, rel=1e-7)
            module.scale = model.stages[0].blocks[0].attention.scale
    return model.train(), other.train()


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("ours", "theirs", "img_size"), CASES)
def test_logits_and_gradients_equal_timms(ours: str, theirs: str, img_size: int, batch_size: int) -> None:
    model, other = build_pair(ours, theirs, img_size, num_classes=10)
    generator = torch.Generator().manual_seed(batch_size)
    images = torch.randn(batch_size, 3, img_size, img_size, dtype=torch.float64, generator=generator)
    labels = torch.arange(batch_size)
    logits, expected = model(images), other(images)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    for values in (logits, expected):
        nn.functional.cross_entropy(values, labels).backward()
    gradients = weights.to_timm_state({name: p.grad for name, p in model.named_parameters()})
    others = {name: p.grad for name, p in other.named_parameters()}
    assert gradients.keys() == others.keys()
    for name, gradient in others.items():
        assert gradient.abs().max() > 0, name
        difference = (gradients[name] - gradient).norm() / gradient.norm()
        assert difference < 1e-10, name
