"""Activation checkpointing, proven by what it does: equal bits, counted FLOPs, bytes that are alive.

Hooks on saved tensors would prove nothing: what selective checkpointing keeps does not pass through them.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from gcvit.config.load import load_config
from gcvit.config.schema import Config
from gcvit.errors import UserError
from gcvit.model import GCViT
from gcvit.model.from_config import build_model
from gcvit.optim.loss import soft_target_loss
from gcvit.parallel import activation_budget
from gcvit.parallel.activation_budget import Compute, StorageTracker, activation_bytes, choose_parts, measure_parts
from gcvit.parallel.activation_checkpointing import recompute, recompute_parts
from gcvit.parallel.build import build_engine
from tests.helpers.launching import ROOT

MODES = ("none", "selective", "blocks", "full")
NUM_IMAGES = 2
FP32 = Compute(torch.device("cpu"), torch.float32, autocast=False)
BF16 = Compute(torch.device("cpu"), torch.bfloat16, autocast=False)
AUTOCAST = Compute(torch.device("cpu"), torch.bfloat16, autocast=True)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def configure(*overrides: str) -> Config:
    """Every kind of part at 64x64, query generators with and without pooling among them; four images."""
    shape = ["model.img_size=64", "model.overrides.depths=[2, 2, 2, 2]", "model.overrides.windows=[4, 4, 4, 2]"]
    wanted = [*shape, "model.drop_path=0.3", "global_batch_size=4", *overrides]
    return load_config(ROOT / "tests/helpers/golden.yaml", wanted)[0]


def build(compute: Compute = FP32, drop_path: float = 0.3, *, on_meta: bool = False) -> GCViT:
    config = configure(f"model.drop_path={drop_path}")
    with torch.device("meta" if on_meta else "cpu"):
        model = build_model(config.model).train()
    if not on_meta:
        model.init_weights(0)
        model.to(compute.weights_dtype)
    return model


def draw_batch(compute: Compute = FP32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(NUM_IMAGES, 3, 64, 64, generator=generator).to(compute.weights_dtype)
    return images, torch.softmax(torch.randn(NUM_IMAGES, 4, generator=generator), 1)


def bytes_after_forward(model: GCViT, compute: Compute) -> int:
    """Of real tensors."""
    images = draw_batch(compute)[0]
    with StorageTracker(model.parameters()) as tracker, compute.context():
        _logits = model(images)
        return tracker.bytes_alive()


def run(model: GCViT, compute: Compute) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    images, targets = draw_batch(compute)
    torch.manual_seed(1)
    with compute.context():
        loss = soft_target_loss(model(images).float(), targets).sum()
    torch.rand(7)  # what draws in between must not move drop path
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ---- equal bits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("compute", [FP32, BF16, AUTOCAST], ids=["fp32", "bf16", "autocast"])
def test_losses_and_gradients_are_those_without(compute, mode):
    loss, gradients = run(build(compute), compute)
    model = build(compute)
    recompute_parts(model, mode)
    loss_again, gradients_again = run(model, compute)
    assert torch.equal(loss, loss_again)
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradients_again[name], gradient), name
    # And drop path was on: without it the loss is another.
    assert not torch.equal(loss, run(build(compute, drop_path=0.0), compute)[0])


@pytest.mark.parametrize("mode", MODES[1:])
def test_evaluation_is_not_wrapped(mode):
    model = build().eval()
    recompute_parts(model, mode)
    images = draw_batch()[0]
    with StorageTracker(model.parameters()) as tracker:
        logits = model(images)
        stored = tracker.bytes_alive()
    assert stored == bytes_after_forward(build().eval(), FP32)
    assert torch.equal(logits, build().eval()(images))


# ---- FLOPs ---------------------------------------------------------------------------------------

LINEAR = (torch.ops.aten.addmm, torch.ops.aten.mm)


def count_flops(mode: str) -> tuple[int, dict[str, dict]]:
    """FLOPs of backward, and those of forward by module and operation."""
    model = build()
    recompute_parts(model, mode)
    images, targets = draw_batch()
    with FlopCounterMode(display=False) as forward:
        loss = soft_target_loss(model(images), targets).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return backward.get_total_flops(), forward.get_flop_counts()


@pytest.mark.parametrize("mode", MODES[1:])
def test_what_is_wrapped_is_computed_again_and_nothing_else(mode):
    plain, by_module = count_flops("none")
    wrapped = [n for n in build().cut_points()[:-1] if mode != "blocks" or ".blocks." in n]
    expected = sum(
        flops
        for name in wrapped
        for op, flops in by_module[f"GCViT.{name}"].items()
        if mode != "selective" or op not in LINEAR
    )
    with set_checkpoint_early_stop(False):
        assert count_flops(mode)[0] - plain == expected
    # As it is used, it stops at the last tensor that backward asks for.
    assert 0.9 * expected <= count_flops(mode)[0] - plain <= expected


# ---- bytes ---------------------------------------------------------------------------------------


def test_the_tracker_counts_what_is_alive_once():
    weight, x = torch.ones(8, 8), torch.ones(4, 8)
    with StorageTracker([weight]) as tracker:
        y = x @ weight
        views = [y[0], y.view(-1), weight.t()]
        (y + 1).exp()
        assert tracker.bytes_alive() == 2 * 4 * 8 * 4
        seen = tracker.num_seen
        z = y.double()
        assert tracker.bytes_alive(seen) == 4 * 8 * 8
        assert tracker.bytes_alive(without=activation_budget.address_of(views[0])) == 4 * 8 * 4 + 4 * 8 * 8
        del z
        assert tracker.bytes_alive(seen) == 0


@pytest.mark.parametrize(
    ("compute", "tolerance"),
    [(FP32, 0), pytest.param(BF16, 0, marks=pytest.mark.slow), (AUTOCAST, 0.01)],
    ids=["fp32", "bf16", "autocast"],
)
def test_each_mode_stores_less_and_what_was_predicted(compute, tolerance):
    measured = {}
    for mode in MODES:
        model = build(compute)
        recompute_parts(model, mode)
        measured[mode] = bytes_after_forward(model, compute)
    meta = build(on_meta=True)
    parts = meta.cut_points()[:-1]
    blocks = [name for name in parts if ".blocks." in name]
    for mode, names in (("none", []), ("blocks", blocks), ("full", parts)):
        predicted = activation_bytes(meta, names, compute, NUM_IMAGES)
        assert predicted == pytest.approx(measured[mode], rel=tolerance), mode
    assert measured["none"] > 1.5 * measured["selective"]
    assert measured["none"] > 1.5 * measured["blocks"]
    assert min(measured["selective"], measured["blocks"]) > 1.2 * measured["full"]


def test_bytes_of_parts_are_what_checkpointing_them_frees():
    model = build(on_meta=True)
    whole = activation_bytes(model, [], FP32, NUM_IMAGES)
    parts = {part.name: part for part in measure_parts(model, FP32, NUM_IMAGES)[0]}
    assert list(parts) == model.cut_points()
    for name in ("stem", "stages.1.downsample", "stages.1.query_generator", "stages.2.blocks.0", "stages.2.blocks.1"):
        part = parts[name]
        freed = whole - activation_bytes(model, [part.name], FP32, NUM_IMAGES)
        # A block that is forgotten has to remember the global queries.
        kept = 4 * NUM_IMAGES * 4 * 4 * 128 if ".blocks." in part.name else 0
        assert part.num_bytes - kept <= freed <= part.num_bytes, part.name
        assert part.milliseconds > 0


# ---- the budget ----------------------------------------------------------------------------------


def test_a_budget_takes_the_best_parts_first_and_no_more_than_it_needs(monkeypatch):
    """Whatever the times are."""
    random = np.random.RandomState(0)
    model = build(on_meta=True)
    parts = [
        dataclasses.replace(p, milliseconds=random.uniform(1, 9)) for p in measure_parts(model, FP32, NUM_IMAGES)[0]
    ]
    rate = {part.name: part.num_bytes / part.milliseconds for part in parts}
    whole, least = (activation_bytes(model, names, FP32, NUM_IMAGES) for names in ([], model.cut_points()))
    monkeypatch.setattr(activation_budget, "measure_parts", lambda *_: (parts, whole))
    for share in (0.0, 0.4):
        allowed = int(least + share * (whole - least))
        choice = choose_parts(model, FP32, NUM_IMAGES, allowed)
        rates = [rate[name] for name in choice.names]
        assert rates == sorted(rates, reverse=True)
        assert min(rates) >= max((r for name, r in rate.items() if name not in choice.names), default=0)
        assert choice.num_bytes <= allowed
        assert activation_bytes(model, choice.names[:-1], FP32, NUM_IMAGES) > allowed
        real = build()
        recompute(real, choice.names)
        assert bytes_after_forward(real, FP32) == choice.num_bytes
    assert choose_parts(model, FP32, NUM_IMAGES, whole).names == []


def test_a_budget_below_all_parts_is_refused_with_the_numbers():
    model = build(on_meta=True)
    least = activation_bytes(model, model.cut_points(), FP32, NUM_IMAGES)
    with pytest.raises(UserError, match=f"got {least:,} bytes; expected: activation_budget_bytes={least - 1};"):
        choose_parts(model, FP32, NUM_IMAGES, least - 1)


@pytest.mark.gpu
def test_a_config_sets_the_budget_of_a_micro_batch_and_says_what_was_chosen(world):
    meta = build(on_meta=True)
    allowed = activation_bytes(meta, [], FP32, 4) // 2
    config = configure("activation_checkpointing=budget", f"activation_budget_bytes={allowed}")
    notices: list[str] = []
    before = torch.get_rng_state()
    build_engine(configure(), world, num_micro_steps=1)
    plain = torch.get_rng_state()
    torch.set_rng_state(before)
    engine = build_engine(config, world, num_micro_steps=1, notices=notices)
    assert torch.equal(torch.get_rng_state(), plain), "measuring has moved the random numbers"
    images = torch.randn(4, 3, 64, 64).to(world.device)
    engine.module.train()
    with StorageTracker(engine.module.parameters()) as tracker:
        _logits = engine.module(images)
        stored = tracker.bytes_alive()
    assert 0.5 * allowed < stored <= allowed
    assert len(notices) == 1
    assert f"{stored / 1e6:,.1f} MB of activations for 4 images within {allowed / 1e6:,.1f} MB" in notices[0]
