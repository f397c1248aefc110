"""Every engine in a world of one: the same tests prove the same contract. The golden runs have more processes."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gcvit.model.from_config import build_model
from gcvit.optim.adamw import EXP_AVG, EXP_AVG_SQ, MODEL, Counters
from gcvit.optim.loss import soft_target_loss
from gcvit.parallel.engine import fill
from gcvit.training.ema import Ema
from tests.helpers.engines import (
    ENGINES,
    build,
    build_bare_model,
    compute_logits,
    configure,
    copy_all,
    draw_batch,
    train_step,
)

each_engine = pytest.mark.parametrize("name", ENGINES)
each_kind = pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2", "zero3"])
pytestmark = pytest.mark.gpu


@each_engine
def test_fragments_cover_each_parameter_once_and_are_alive(name, world):
    engine = build(name, world)
    shapes = {n: p.shape for n, p in build_model(configure(name).model).named_parameters()}
    kinds = engine.fragments()
    assert kinds.keys() == {MODEL, EXP_AVG, EXP_AVG_SQ}
    for parts in kinds.values():
        assert {n: part.shape for n, part in parts.items()} == shapes
        for part in parts.values():
            assert (part.start, part.data.shape, part.data.dtype) == (0, (part.shape.numel(),), torch.float32)
            assert (part.replica, part.num_replicas) == (0, 1)
        places = sorted((part.data.data_ptr(), part.data.numel() * 4) for part in parts.values())
        for (place, size), (following, _) in itertools.pairwise(places):
            assert place + size <= following, "two fragments share memory"
    again = engine.fragments()
    for kind, parts in kinds.items():
        for n, part in parts.items():
            assert part.data.data_ptr() == again[kind][n].data.data_ptr(), "a copy and no view"

    # They begin at the seed's initial weights.
    model = build_bare_model(configure(name), world.device)
    model.init_weights(configure(name).seed)
    for n, p in model.named_parameters():
        assert torch.equal(kinds[MODEL][n].data.view(p.shape), p), n

    # A step of the engine shows in the fragments that were taken before it.
    images, targets = draw_batch(world.device)
    torch.nn.functional.cross_entropy(model(images), targets).backward()
    before = copy_all(engine)
    train_step(engine)
    num_moved = 0
    for n, p in model.named_parameters():
        if p.grad.any():  # not in the last stage's windows of one position
            num_moved += 1
            for kind, parts in kinds.items():
                assert not torch.equal(parts[n].data, before[f"{kind}.{n}"]), f"{kind}.{n}"
    assert num_moved > 160


@each_engine
def test_what_is_written_is_computed_with(name, world):
    """Through fragments and `refresh`, also right after forward passes that left gathered copies behind."""
    engine = build(name, world)
    model = build_bare_model(configure(name), world.device)
    for seed in (11, 12):
        for training in (True, False):
            compute_logits(engine, training)
        model.init_weights(seed)
        fill(engine.fragments()[MODEL], lambda n: dict(model.named_parameters())[n].detach())
        engine.refresh()
        with torch.no_grad():
            expected = model.eval()(draw_batch(world.device)[0])
        torch.testing.assert_close(compute_logits(engine), expected, rtol=1e-5, atol=1e-6)


@each_engine
def test_a_swapped_in_average_leaves_no_trace(name, world):
    engine = build(name, world)
    ema = Ema(engine.fragments()[MODEL], half_life_samples=64, global_batch_size=32)
    first = compute_logits(engine)
    for seed in range(2):
        train_step(engine, seed)
        ema.update()
    before, weights = compute_logits(engine), copy_all(engine)
    average = {n: part.data.clone() for n, part in ema.fragments.items()}
    with ema.swapped_in(engine):
        inside = compute_logits(engine)
    assert torch.equal(compute_logits(engine), before)
    assert all(torch.equal(tensor, weights[n]) for n, tensor in copy_all(engine).items())
    assert all(torch.equal(part.data, average[n]) for n, part in ema.fragments.items())

    # And inside it was the average indeed: neither the weights of now nor those of the beginning.
    model = build_bare_model(configure(name), world.device).eval()
    model.load_state_dict({n: average[n].view(p.shape) for n, p in model.named_parameters()})
    with torch.no_grad():
        torch.testing.assert_close(inside, model(draw_batch(world.device)[0]), rtol=1e-5, atol=1e-6)
    assert min((inside - other).abs().max() for other in (before, first)) > 1e-5


@pytest.mark.parametrize(
    ("name", "factor"),
    [("ddp", "nan"), ("fsdp", "nan"), ("zero2", "nan"), ("zero3", "nan"), ("ddp", "inf"), ("zero2", "inf")],
)
def test_a_gradient_that_is_not_finite_changes_nothing(name, factor, world):
    engine = build(name, world)
    train_step(engine)
    before = copy_all(engine)
    result = train_step(engine, factor=float(factor))
    assert result.applied.item() == 0
    assert not torch.isfinite(result.grad_norm)
    assert all(torch.equal(tensor, before[n]) for n, tensor in copy_all(engine).items())
    assert engine.counters().updates == 1
    # Nothing of the refused gradient is left: the next one is what a bare model has here.
    model = build_bare_model(configure(name), world.device)
    model.load_state_dict({n: before[f"model.{n}"].view(p.shape) for n, p in model.named_parameters()})
    images, targets = draw_batch(world.device, seed=5)
    (torch.nn.functional.cross_entropy(model(images), targets, reduction="sum") / 32).backward()
    result = train_step(engine, seed=5)
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(result.grad_norm, expected, rtol=1e-5, atol=0)
    assert result.applied.item() == 1
    assert engine.counters().updates == 2


@each_kind
def test_micro_steps_add_up(name, world):
    """Three of 5, 3 and 0 samples (one of zero target, as a rank without samples has) are one of 8."""
    whole = build(name, world, "global_batch_size=8")
    parts = build(name, world, "global_batch_size=8", num_micro_steps=3)
    images, targets = draw_batch(world.device, 8)
    for engine, cuts in ((whole, [slice(0, 8)]), (parts, [slice(0, 5), slice(5, 8), slice(0, 1)])):
        engine.module.train()
        for i, cut in enumerate(cuts):
            loss = soft_target_loss(engine(images[cut]), targets[cut] * (i < 2)).sum()
            engine.backward(loss)
    norms = [engine.step(1e-3).grad_norm for engine in (whole, parts)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-5, atol=0)
    model = build_bare_model(configure(name), world.device)
    model.init_weights(configure(name).seed)
    torch.nn.functional.cross_entropy(model(images), targets).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(norms[0], expected, rtol=1e-5, atol=0)


def test_fp32_is_no_tf32(world):
    """In which a GPU would compute: what `join_world` has to say of it."""
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_ddp_has_one_memory_for_gradients(world):
    """That of the buckets, from the first micro-step of the first step on."""
    engine = build("ddp", world, num_micro_steps=2)
    engine.module.train()
    images, targets = draw_batch(world.device)
    places = [[p.grad.data_ptr() for p in engine.module.parameters()]]
    for _ in range(2):
        for _ in range(2):
            engine.backward(soft_target_loss(engine(images), targets).sum())
            places.append([p.grad.data_ptr() for p in engine.module.parameters()])
        engine.step(1e-3)
    assert all(later == places[0] for later in places)


@pytest.mark.parametrize("name", ["ddp", "zero3"])
def test_the_count_of_updates_can_be_set(name, world):
    """Adam's bias correction follows it: after many updates a first step of fresh moments is a tenth of lr or
    so."""
    engine = build(name, world, "optim.weight_decay=0")
    assert engine.counters().updates == 0
    engine.set_counters(Counters(updates=10_000))
    before = copy_all(engine)
    train_step(engine, lr=1e-3)
    assert engine.counters().updates == 10_001
    moved = engine.fragments()[MODEL]["head.fc.weight"].data - before["model.head.fc.weight"]
    # m / sqrt(v) of a first gradient, uncorrected: .1 g / sqrt(.001 g^2) is 3.16 where the corrected is 1.
    assert moved.abs().max().item() == pytest.approx(3.16e-3, rel=0.01)


# ---- recomputation -------------------------------------------------------------------------------


def run_counted(mode: str, device: torch.device, drop_path: float = 0.0) -> tuple[int, int, dict[str, Tensor]]:
    """FLOPs of forward and of backward, and the gradients."""
    from gcvit.parallel.activation_checkpointing import recompute_parts

    config = configure("ddp", f"model.drop_path={drop_path}")
    model = build_bare_model(config, device)
    model.init_weights(0)
    recompute_parts(model, mode)
    images, targets = draw_batch(device)
    torch.manual_seed(0)
    with FlopCounterMode(display=False) as forward:
        loss = soft_target_loss(model(images), targets).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return forward.get_total_flops(), backward.get_total_flops(), gradients


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_full_checkpointing_computes_forward_again_and_the_same_gradients(drop_path, device):
    forward, backward, gradients = run_counted("none", device, drop_path)
    forward_full, backward_full, gradients_full = run_counted("full", device, drop_path)
    assert forward_full == forward
    # All but the head and what is behind the last tensor that a part needs to have back.
    assert 0.9 * forward <= backward_full - backward <= forward
    for n, gradient in gradients.items():
        assert torch.equal(gradients_full[n], gradient), n


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero3"])
def test_checkpointing_works_in_every_engine(name, mode, world):
    plain, full = (
        build(name, world, "model.drop_path=0.3", f"activation_checkpointing={mode}") for mode in ("none", mode)
    )
    counts = []
    for engine in (plain, full):
        torch.manual_seed(1)
        images, targets = draw_batch(world.device)
        engine.module.train()
        loss = soft_target_loss(engine(images), targets).sum()
        with FlopCounterMode(display=False) as backward:
            engine.backward(loss)
        engine.step(1e-3)
        counts.append(backward.get_total_flops())
    if mode == "full":  # a part's own products are computed again, and selectively they are not
        assert counts[1] > 1.2 * counts[0]
    expected = copy_all(plain)
    assert all(torch.equal(tensor, expected[n]) for n, tensor in copy_all(full).items())


def named(tensors: dict[str, Tensor], *, of_head: bool) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if (".head." in name) == of_head}


@each_engine
def test_the_head_alone_moves(name, world):
    """The rest keeps its bits but gathers its moments, and goes on with them."""
    engine = build(name, world, "optim.frozen_backbone=1 step", "optim.layer_decay=0.8")
    before = copy_all(engine)
    images, targets = draw_batch(world.device)
    engine.module.train()
    engine.backward(soft_target_loss(engine(images), targets).sum())
    assert engine.step(1e-3, head_only=True).applied.item() == 1
    after = copy_all(engine)
    assert all(torch.equal(t, before[n]) for n, t in named(after, of_head=False).items() if n.startswith(MODEL))
    assert not any(torch.equal(t, before[n]) for n, t in named(after, of_head=True).items())
    assert sum(after[n].any().item() for n in named(after, of_head=False) if n.startswith(EXP_AVG + ".")) > 160
    train_step(engine)
    later = copy_all(engine)
    moved = [n for n in named(later, of_head=False) if n.startswith(MODEL) and not torch.equal(later[n], after[n])]
    assert len(moved) > 160


@each_kind
def test_each_layer_learns_at_its_own_rate(name, world):
    """AdamW's first update is the learning rate, times the gradient's sign: it shows each parameter's rate."""
    engine = build(name, world, "optim.layer_decay=0.5", "optim.weight_decay=0", "optim.eps=1e-20")
    layers, before = engine.module.find_layers(), copy_all(engine)
    train_step(engine, lr=1e-3)
    after = copy_all(engine)
    for n, layer in layers.items():
        moved = (after[f"{MODEL}.{n}"] - before[f"{MODEL}.{n}"]).abs()
        if after[f"{EXP_AVG}.{n}"].any():
            expected = 1e-3 * 0.5 ** (max(layers.values()) - layer)
            assert moved.max().item() == pytest.approx(expected, rel=1e-2, abs=1e-7), n
