"""Decay groups, clipping, and the refusal of a gradient that is not finite."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import param_groups_layer_decay

from gcvit.config.schema import OptimConfig
from gcvit.model import create_model
from gcvit.optim.adamw import build_adamw, create_moments, decays, set_lr
from gcvit.optim.clip_grad import clip_and_step, global_norm

SHAPES = [(3, 5), (5,), (2, 3, 3, 3), (7,), (1, 9)]
LAYERS = {f"w{i}": i for i in range(len(SHAPES))}


def model_parameters() -> dict[str, torch.nn.Parameter]:
    with torch.device("meta"):
        model = create_model("gc_vit_small", num_classes=10, img_size=64)
    return dict(model.named_parameters())


@pytest.mark.parametrize("decay_bias_tables", [True, False])
def test_what_decays(decay_bias_tables):
    """Every parameter of a real model, by the module that holds it rather than by its name."""
    with torch.device("meta"):
        model = create_model("gc_vit_small", num_classes=10, img_size=64)
    seen = {True: 0, False: 0}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if leaf == "bias_table":
                expected = decay_bias_tables
            else:
                expected = isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and leaf == "weight"
            full_name = f"{name}.{leaf}"
            assert decays(full_name, parameter.shape, decay_bias_tables=decay_bias_tables) == expected, full_name
            seen[expected] += 1
    assert min(seen.values()) > 50


@pytest.mark.parametrize("decay_bias_tables", [True, False])
def test_a_flat_shard_decays_as_its_whole(decay_bias_tables):
    optim = OptimConfig(lr=1e-3, weight_decay=0.3, decay_bias_tables=decay_bias_tables)
    whole = {name: tuple(p.shape) for name, p in model_parameters().items()}
    shards = {name: torch.zeros(3) for name in whole}
    optimizer = build_adamw(((n, whole[n], shards[n]) for n in whole), optim, dict.fromkeys(whole, 0))
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, shape in whole.items():
        expected = 0.3 if decays(name, shape, decay_bias_tables=decay_bias_tables) else 0.0
        assert decay_of[id(shards[name])] == expected, name
    assert len(decay_of) == len(whole)
    assert {len(group["params"]) for group in optimizer.param_groups} != {0}


def name_them(tensors: list[torch.Tensor]) -> Iterator[tuple[str, tuple[int, ...], torch.Tensor]]:
    return ((name, tuple(tensor.shape), tensor) for name, tensor in zip(LAYERS, tensors, strict=True))


def build(seed: int, optim: OptimConfig, scale: float = 1.0) -> tuple[torch.optim.AdamW, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    optimizer = build_adamw(name_them(tensors), optim, LAYERS)
    create_moments(optimizer)
    for tensor in tensors:
        tensor.grad = scale * torch.randn(tensor.shape, generator=generator)
    return optimizer, tensors


@given(
    seed=st.integers(0, 100),
    scale=st.sampled_from([1e-6, 0.1, 1.0, 1e4]),
    clip=st.sampled_from([None, 0.5, 5.0]),
)
def test_clip_and_step_equal_pytorchs(seed, scale, clip):
    optim = OptimConfig(lr=1e-3, clip_norm=clip)
    optimizer, tensors = build(seed, optim, scale)
    ours = [t.clone() for t in tensors]
    theirs = [t.clone().requires_grad_() for t in tensors]
    for mine, other, tensor in zip(ours, theirs, tensors, strict=True):
        mine.grad, other.grad = tensor.grad.clone(), tensor.grad.clone()
    reference = torch.optim.AdamW(
        [
            {"params": [t for t in theirs if t.ndim > 1], "weight_decay": 0.05},
            {"params": [t for t in theirs if t.ndim == 1], "weight_decay": 0.0},
        ],
        lr=7e-3,
        foreach=False,
    )
    optimizer = build_adamw(name_them(ours), optim, LAYERS)
    create_moments(optimizer)
    grads = [t.grad for t in ours]
    set_lr(optimizer, 7e-3)
    result = clip_and_step(optimizer, grads, global_norm(grads), clip)
    norm = torch.nn.utils.clip_grad_norm_(theirs, clip or float("inf"))
    reference.step()
    torch.testing.assert_close(result.grad_norm, norm, rtol=1e-6, atol=0)
    assert result.applied.item() == 1
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=0)
        torch.testing.assert_close(mine, other.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip", [None, 0.5, 5.0])
def test_a_loss_scale_leaves_no_trace(clip):
    """A power of two, undone in the multiplication of clipping: the gradients too come out to the bit."""
    left = []
    for scale in (None, torch.tensor(2.0**13)):
        optimizer, tensors = build(5, OptimConfig(lr=1e-2), scale=1.0 if scale is None else 2.0**13)
        grads = [t.grad for t in tensors]
        result = clip_and_step(optimizer, grads, global_norm(grads), clip, scale)
        left.append([result.grad_norm, result.applied, *grads, *tensors])
    for plain, scaled in zip(*left, strict=True):
        assert torch.equal(plain, scaled)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("at", [(0, 0), (4, 8)])
def test_a_bad_gradient_touches_nothing(bad, clip, at):
    """One bad element in one tensor: all parameters, moments and counters keep their bits; the next step
    works."""
    optimizer, tensors = build(0, OptimConfig(lr=1e-2))
    grads = [t.grad for t in tensors]
    clip_and_step(optimizer, grads, global_norm(grads), clip)  # moments and counters that are not zero

    def state() -> list[torch.Tensor]:
        moments = [value for t in tensors for value in optimizer.state[t].values()]
        return [t.clone() for t in (*tensors, *moments)]

    before = state()
    good = [grad.clone() for grad in grads]
    grads[at[0]].view(-1)[at[1]] = bad
    result = clip_and_step(optimizer, grads, global_norm(grads), clip)
    assert result.applied.item() == 0
    assert not torch.isfinite(result.grad_norm)
    assert all(torch.equal(now, then) for now, then in zip(state(), before, strict=True))

    for grad, value in zip(grads, good, strict=True):
        grad.copy_(value)
    result = clip_and_step(optimizer, grads, global_norm(grads), clip)
    assert result.applied.item() == 1
    assert not any(torch.equal(now, then) for now, then in zip(state(), before, strict=True))
    assert {s["step"].item() for s in optimizer.state.values()} == {2.0}


def test_created_moments_are_what_the_first_step_would_create():
    first, tensors = build(3, OptimConfig(lr=1e-3))
    second, others = build(3, OptimConfig(lr=1e-3))
    second.state.clear()
    for optimizer, group in ((first, tensors), (second, others)):
        grads = [t.grad for t in group]
        clip_and_step(optimizer, grads, global_norm(grads), None)
    for one, other in zip(tensors, others, strict=True):
        assert torch.equal(one, other)
        for key, value in second.state[other].items():
            assert torch.equal(first.state[one][key], value)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 1000))
def test_the_norm_is_over_all_tensors_together(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(size, generator=generator) for size in sizes]
    torch.testing.assert_close(global_norm(grads), torch.cat(grads).norm(), rtol=1e-6, atol=0)


def test_layers_learn_at_timms_rates():
    """timm's groups by layer decay, for every parameter of a real model; the head learns at the schedule's rate."""
    with torch.device("meta"):
        model = create_model("gc_vit_small", num_classes=10, img_size=64)
    layers, parameters = model.find_layers(), dict(model.named_parameters())
    optim = OptimConfig(lr=1e-3, layer_decay=0.75)
    assert layers["stem.conv.weight"] == 0
    assert layers["head.fc.weight"] == max(layers.values()) == 1 + sum((3, 4, 19, 5))
    ours = build_adamw(((n, tuple(p.shape), p) for n, p in parameters.items()), optim, layers)
    set_lr(ours, 2e-3)
    rates = {id(p): group["lr"] for group in ours.param_groups for p in group["params"]}
    theirs = param_groups_layer_decay(model, layer_decay=0.75)
    scales = {id(p): group["lr_scale"] for group in theirs for p in group["params"]}
    assert rates == pytest.approx({key: 2e-3 * scale for key, scale in scales.items()}, rel=1e-12)
    assert len(ours.param_groups) == 2 * (1 + max(layers.values()))


def test_the_head_alone_moves():
    """Nothing else, to the bit, not by decay either; the moments of the rest go on, so that it starts with them."""
    optim = OptimConfig(lr=1e-2, weight_decay=0.5, frozen_backbone="1 step")
    optimizer, tensors = build(3, optim)
    before, grads = [t.clone() for t in tensors], [t.grad for t in tensors]
    set_lr(optimizer, 1e-2, head_only=True)
    clip_and_step(optimizer, grads, global_norm(grads), None)
    assert [torch.equal(now, then) for now, then in zip(tensors, before, strict=True)] == [True] * 4 + [False]
    assert all(optimizer.state[t]["exp_avg"].any() for t in tensors)
    set_lr(optimizer, 1e-2)
    clip_and_step(optimizer, grads, global_norm(grads), None)
    assert not any(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))
