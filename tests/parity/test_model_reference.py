"""The model against numbers computed on the official implementation (float64), without any weight file."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gcvit.model import VARIANTS, create_model
from gcvit.model.gcvit import GCViT
from gcvit.model.weights import to_official, to_official_state

REFERENCE = Path(__file__).parent / "reference"
NAMES = {
    "gc_vit_xxtiny": "gc_vit_xxtiny.json",
    "gc_vit_tiny2": "gc_vit_tiny2.json",
    "gc_vit_small": "gc_vit_small.json",
    "gc_vit_large": "gc_vit_large.json",
    "gc_vit_large_512": "gc_vit_large_512_21k.json",
}
SLOW = {"gc_vit_large", "gc_vit_large_512"}

# Parameters in millions and GMAC of an image, counted on the official code.
COUNTS = {
    "gc_vit_xxtiny": (11.995, 2.121),
    "gc_vit_xtiny": (19.981, 2.913),
    "gc_vit_tiny": (28.222, 4.761),
    "gc_vit_tiny2": (34.536, 6.178),
    "gc_vit_small": (51.092, 8.530),
    "gc_vit_small2": (68.615, 11.538),
    "gc_vit_base": (90.321, 14.816),
    "gc_vit_large": (202.076, 32.555),
    "gc_vit_large_384": (202.861, 103.943),
    "gc_vit_large_512": (203.795, 202.137),
}


def read_reference(name: str) -> dict[str, Any]:
    return json.loads((REFERENCE / NAMES[name]).read_text())


def reference_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """The reference's value of an official parameter, by formula."""
    seed = zlib.crc32(name.encode()) & 0x7FFFFFFF
    r = np.random.RandomState(seed).standard_normal(shape)
    if name.endswith("relative_position_bias_table"):
        r = 0.5 * r
    elif name.endswith(("gamma1", "gamma2")):
        r = 0.5 + 0.1 * r
    elif len(shape) >= 2:
        r = r / np.sqrt(np.prod(shape[1:]))
    elif name.endswith("weight"):
        r = 1 + 0.1 * r
    else:
        r = 0.1 * r
    return torch.from_numpy(r)


def reference_images(img_size: int) -> Tensor:
    images = np.random.RandomState(7).standard_normal((3, 3, img_size, img_size))
    scale, shift = np.array([0.5, 1, 2]), np.array([-1, 0, 1])
    return torch.from_numpy(images * scale[:, None, None, None] + shift[:, None, None, None])


def build_reference_model(name: str, **overrides: Any) -> GCViT:
    """The variant in float64 and evaluation mode, its weights by formula."""
    with torch.device("meta"):
        model = create_model(name, **overrides).double()
    model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for ours, parameter in model.named_parameters():
            parameter.copy_(reference_tensor(to_official(ours), tuple(parameter.shape)))
    return model


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in NAMES])
def test_logits_and_features_equal_the_official_ones(name: str) -> None:
    reference = read_reference(name)
    model = build_reference_model(name)
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(reference_images(model.img_size)), pre_logits=True)
        logits = model.get_classifier()(pooled)
    for values, key in ((pooled, "features_head"), (logits, "logits_head")):
        expected = torch.tensor(reference[key], dtype=torch.float64)
        torch.testing.assert_close(values[:, : expected.shape[1]], expected, rtol=0, atol=1e-9)
    norms = torch.tensor(reference["logits_norm"], dtype=torch.float64)
    torch.testing.assert_close(logits.norm(dim=1), norms, rtol=0, atol=1e-9)
    assert logits.argmax(dim=1).tolist() == reference["argmax"]


@pytest.mark.parametrize("name", NAMES)
def test_official_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        state = to_official_state(create_model(name).state_dict())
    expected = {key: tuple(shape) for key, shape in _items(read_reference(name)["state_dict"])}
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == expected


def _items(state_dict: Any) -> list[tuple[str, list[int]]]:
    return list(state_dict.items()) if isinstance(state_dict, dict) else [tuple(item) for item in state_dict]


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_and_multiply_counts(name: str) -> None:
    row = VARIANTS[name]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as flops:
        model = create_model(name).eval()
        model(torch.empty(1, 3, row.img_size, row.img_size))
    num_params = sum(parameter.numel() for parameter in model.parameters())
    gmacs = round(flops.get_total_flops() / 2e9, 3)
    assert (num_params, gmacs) == (row.num_params, row.counted_gmacs)
    assert (round(num_params / 1e6, 3), gmacs) == COUNTS[name]
    if name in NAMES:
        assert num_params == read_reference(name)["parameters"]
