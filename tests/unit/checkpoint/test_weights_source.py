"""Weights to evaluate: their average, their digest, and other sizes. Runs are met in test_evaluate_cli.py."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gcvit.checkpoint.weights_source import Candidate, average, digest, find_candidate, find_file, load
from gcvit.config.schema import DataConfig, ModelConfig, OverridesConfig
from gcvit.errors import UserError
from gcvit.model import create_model, weights
from gcvit.model.from_config import build_model

SMALL = OverridesConfig(width=8, depths=[2, 2, 2, 2], num_heads=[1, 1, 1, 1])
MODEL = ModelConfig(name="gc_vit_xxtiny", num_classes=3, img_size=32, overrides=SMALL)


def make(seed: int) -> Candidate:
    generator = torch.Generator().manual_seed(seed)
    state = {n: torch.randn(p.shape, generator=generator) for n, p in build_model(MODEL).state_dict().items()}
    return Candidate(f"runs/{seed}", "ema", seed, MODEL, DataConfig(), ("a", "b", "c"), None, lambda world: state)


@pytest.fixture
def read() -> Callable:
    return lambda candidate: candidate.read(None)


def test_an_average_is_the_mean_of_each_tensor(read):
    members = [make(seed) for seed in range(3)]
    found = average(members)
    for name, tensor in read(found).items():
        mean = torch.stack([read(member)[name].double() for member in members]).mean(0).float()
        torch.testing.assert_close(tensor, mean, rtol=1e-7, atol=0)
    assert (found.path, found.weights, found.step) == ("runs/0 + runs/1 + runs/2", "ema", None)
    assert digest(read(members[0])) == digest(read(make(0)))  # whose weights nobody touched
    assert average(members[:1]) is members[0]


@pytest.mark.parametrize(
    "change",
    [
        {"model": MODEL.model_copy(update={"img_size": 64})},
        {"model": MODEL.model_copy(update={"overrides": None})},
        {"classes": ("a", "c", "b")},
    ],
)
def test_only_one_model_can_be_averaged(change):
    with pytest.raises(UserError, match="only weights of one model"):
        average([make(0), replace(make(1), **change)])
    average([make(0), replace(make(1), model=MODEL.model_copy(update={"drop_path": 0.5}))])


def test_a_digest_tells_weights_apart(read):
    state = read(make(0))
    wanted = digest(state)
    assert digest(dict(reversed(state.items()))) == wanted
    bias = state["head.fc.bias"]
    for other in (bias + 2e-7, bias[:2], bias.double()):
        assert digest({**state, "head.fc.bias": other}) != wanted
    assert digest({name.replace("fc", "fd"): tensor for name, tensor in state.items()}) != wanted


def test_another_size_has_other_bias_tables_and_the_same_weights(read):
    candidate = make(0)
    own, larger = (load(candidate, read(candidate), size).state_dict() for size in (32, 64))
    assert all(torch.equal(own[name], tensor) for name, tensor in read(candidate).items())
    differing = {name for name, tensor in larger.items() if tensor.shape != own[name].shape}
    assert differing
    assert all(name.endswith("bias_table") for name in differing)
    assert all(torch.equal(own[name], larger[name]) for name in own.keys() - differing)


def test_windows_that_a_config_names_grow_too(read):
    model = MODEL.model_copy(update={"overrides": SMALL.model_copy(update={"windows": (4, 2, 2, 1)})})
    state = build_model(model).state_dict()
    found = load(replace(make(0), model=model), state, 64).state_dict()
    sides = [round(found[f"stages.{i}.blocks.0.attention.bias_table"].shape[0] ** 0.5) for i in range(4)]
    assert sides == [15, 7, 7, 3]  # of windows of 8, 4, 4 and 2
    assert {name: found[name].shape for name in found if "bias_table" not in name} == {
        name: tensor.shape for name, tensor in state.items() if "bias_table" not in name
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    """A file of the official layout, of four classes."""
    path = tmp_path_factory.mktemp("file") / "weights.pth"
    model = create_model("gc_vit_xxtiny", num_classes=4)
    torch.save({"state_dict": weights.to_official_state(model.state_dict())}, path)
    return str(path)


def test_a_file_in_the_place_of_a_run_is_told_what_it_needs(tmp_path):
    (tmp_path / "w.pth").touch()
    with pytest.raises(UserError, match=r"needs its variant: got .*; hint: --model NAME --checkpoint .*w\.pth"):
        find_candidate(str(tmp_path / "w.pth"))


def test_a_file_says_its_classes_and_its_variant_s_card_the_rest(file, read):
    found = find_file("gc_vit_xxtiny", file)
    assert (found.model.num_classes, found.model.img_size, found.data.crop_pct) == (4, 224, 1.0)
    assert load(found, read(found), 224).num_classes == 4
    with pytest.raises(UserError):
        find_file("gc_vit_tiny", file)
