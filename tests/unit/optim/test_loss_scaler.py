"""The loss scale of fp16: by itself, and in the engines that use it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gcvit.optim.adamw import Counters
from gcvit.optim.loss import soft_target_loss
from gcvit.optim.loss_scaler import LossScale
from gcvit.parallel.build import build_engine
from gcvit.parallel.engine import fill
from tests.helpers.engines import configure, copy_all, draw_batch, train_step

APPLIED, REFUSED = torch.tensor(1.0), torch.tensor(0.0)
pytestmark = pytest.mark.gpu
OFFLOADED = ["fsdp.cpu_offload=true"]
each_engine = pytest.mark.parametrize(
    ("name", "overrides"),
    [("ddp", []), ("fsdp", []), pytest.param("fsdp", OFFLOADED, marks=pytest.mark.slow)],
    ids=["ddp", "fsdp", "fsdp offloaded"],
)


def build_fp16(name: str, world, *overrides: str, num_micro_steps: int = 1):
    return build_engine(configure(name, "precision=fp16", *overrides), world, num_micro_steps=num_micro_steps)


def test_it_halves_at_once_and_doubles_after_2000(device):
    scale = LossScale(device)
    assert scale.get() == (2.0**16, 0)
    value = scale.value
    for _ in range(1999):
        scale.update(APPLIED.to(device))
    assert scale.get() == (2.0**16, 1999)
    scale.update(APPLIED.to(device))
    assert scale.get() == (2.0**17, 0)
    scale.update(APPLIED.to(device))
    scale.update(REFUSED.to(device))
    assert scale.get() == (2.0**16, 0)
    assert scale.value is value


def test_it_goes_on_from_where_it_was_set(device):
    scale = LossScale(device)
    scale.set(2.0**9, 1999)
    assert scale.get() == (2.0**9, 1999)
    scale.update(APPLIED.to(device))
    assert scale.get() == (2.0**10, 0)


def test_it_stays_finite(device):
    scale = LossScale(device)
    scale.set(2.0**127, 1999)
    scale.update(APPLIED.to(device))
    assert scale.get()[0] == 2.0**127


@each_engine
def test_fp16_is_near_fp32_whatever_the_scale(name, overrides, world):
    """Norms and clipping are those of the unscaled gradient: the norms, above clip_norm, and where the steps lead."""
    clip = "optim.clip_norm=0.1"
    exact = build_engine(configure(name, clip, *overrides), world, num_micro_steps=1)
    scaled = [build_fp16(name, world, clip, *overrides) for _ in range(2)]
    for engine, scale in zip(scaled, (2.0**8, 2.0**14), strict=True):
        engine.set_counters(Counters(0, scale, 0))
    for seed in range(3):
        norm = train_step(exact, seed).grad_norm.item()
        for engine in scaled:
            result = train_step(engine, seed)
            assert norm > 0.1
            assert result.grad_norm.item() == pytest.approx(norm, rel=5e-3)
            assert result.applied.item() == 1
    expected = copy_all(exact)
    for engine in scaled:
        for kind in ("exp_avg", "exp_avg_sq"):
            moments = {n: tensor for n, tensor in copy_all(engine).items() if n.startswith(f"{kind}.")}
            got, wanted = (torch.cat([state[n] for n in moments]) for state in (moments, expected))
            assert (got - wanted).norm() < 0.02 * wanted.norm(), kind


@each_engine
def test_an_overflow_changes_nothing_but_the_scale(name, overrides, world):
    engine = build_fp16(name, world, *overrides)
    train_step(engine)
    engine.set_counters(Counters(1, 2.0**26, 7))
    before = copy_all(engine)
    result = train_step(engine)
    assert result.applied.item() == 0
    assert all(torch.equal(tensor, before[n]) for n, tensor in copy_all(engine).items())
    assert engine.counters() == Counters(1, 2.0**25, 0)
    for _ in range(12):  # down to where it fits
        if train_step(engine).applied.item():
            break
    counters = engine.counters()
    assert (counters.updates, counters.loss_scale_updates) == (2, 1)
    assert 2.0**10 < counters.loss_scale <= 2.0**25


@each_engine
def test_a_resumed_run_has_the_same_bits(name, overrides, world):
    """Across a doubling, which an engine that had forgotten the count of updates would not make."""
    whole, resumed = (build_fp16(name, world, *overrides) for _ in range(2))
    whole.set_counters(Counters(0, 2.0**10, 1997))
    train_step(whole, 0)
    state, counters = copy_all(whole), whole.counters()
    assert counters == Counters(1, 2.0**10, 1998)
    for kind, parts in resumed.fragments().items():
        fill(parts, lambda n, kind=kind, parts=parts: state[f"{kind}.{n}"].view(parts[n].shape))
    resumed.refresh()
    resumed.set_counters(counters)
    for seed in (1, 2, 3):
        norms = [train_step(engine, seed).grad_norm for engine in (whole, resumed)]
        assert torch.equal(*norms)
    assert whole.counters() == resumed.counters() == Counters(4, 2.0**11, 1)
    expected = copy_all(whole)
    assert all(torch.equal(tensor, expected[n]) for n, tensor in copy_all(resumed).items())


class _Reads(TorchDispatchMode):
    """Counts what is read by the host: `.item()`, `float(x)`, `if x:`."""

    num_reads = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.num_reads += op is torch.ops.aten._local_scalar_dense.default
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_reads_nothing_from_the_device(name, precision, world):
    engine = build_engine(configure(name, f"precision={precision}"), world, num_micro_steps=1)
    train_step(engine)
    with _Reads() as reads:
        images, targets = draw_batch(world.device)
        loss = soft_target_loss(engine(images), targets).sum()
        engine.backward(loss)
        result = engine.step(1e-3)
    assert reads.num_reads == 0
    with _Reads() as reads:
        result.applied.item()
    assert reads.num_reads == 1
