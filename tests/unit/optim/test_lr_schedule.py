"""Durations, and the learning rate beside timm's scheduler at every step."""

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler

from gcvit.config.schema import OptimConfig, ScheduleConfig
from gcvit.errors import UserError
from gcvit.optim.lr_schedule import Schedule, build_schedule, is_time, to_samples, to_steps

COUNTS = st.integers(1, 10**7)


@given(warmup=st.integers(0, 60), cosine=st.integers(2, 120), cooldown=st.integers(0, 20))
@example(warmup=20, cosine=310, cooldown=10)
@example(warmup=10, cosine=10, cooldown=3)
def test_every_step_is_timms(warmup, cosine, cooldown):
    assume(warmup <= cosine)
    ours = Schedule(5e-3, 1e-6, 5e-6, warmup, cosine, cooldown)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=5e-3)
    theirs = CosineLRScheduler(
        optimizer,
        t_initial=cosine,
        lr_min=5e-6,
        warmup_t=warmup,
        warmup_lr_init=1e-6,
        warmup_prefix=False,
        t_in_epochs=False,
        cycle_limit=1,
    )
    assert ours.total_steps == cosine + cooldown
    for step in range(ours.total_steps):
        theirs.step_update(step)
        assert ours.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def build(cosine="310 epochs", warmup="20 epochs", cooldown="10 epochs", batch=1000, samples=1000) -> Schedule:
    schedule = ScheduleConfig(cosine=cosine, warmup=warmup, cooldown=cooldown)
    optim = OptimConfig(lr=5e-3, warmup_lr=1e-6, min_lr=5e-6)
    return build_schedule(schedule, optim, global_batch_size=batch, samples_per_epoch=samples)


def test_the_published_schedule():
    """With one step an epoch its steps are the official epochs: 320, with the jump where the warm-up ends."""
    schedule = build()
    assert schedule.total_steps == 320
    assert schedule.lr(0) == 1e-6
    assert schedule.lr(19) == pytest.approx(4.75e-3, abs=1e-6)
    assert schedule.lr(20) == pytest.approx(4.949e-3, abs=1e-6)
    assert [schedule.lr(step) for step in range(310, 320)] == [5e-6] * 10
    assert schedule.lr(309) > 5e-6


def test_imagenet_at_the_published_batch():
    schedule = build(batch=1024, samples=1_281_167)
    assert schedule.total_steps == pytest.approx(320 * 1_281_167 / 1024, abs=1)


@given(amount=st.integers(0, 10**6), batch=COUNTS, samples=COUNTS)
def test_durations_agree_between_units(amount, batch, samples):
    length = {"global_batch_size": batch, "samples_per_epoch": samples}
    assert to_steps(f"{amount} steps", **length) == amount
    assert to_samples(f"{amount} samples", **length) == amount
    assert to_samples(f"{amount} epochs", **length) == amount * samples
    assert to_steps(f"{amount * batch} samples", **length) == amount
    assert abs(to_steps(f"{amount} epochs", **length) - amount * samples / batch) <= 0.5 + 1e-6


def test_durations_in_words():
    length = {"global_batch_size": 100, "samples_per_epoch": 1000}
    assert to_steps("1 epoch", **length) == 10
    assert to_steps("0.5 epochs", **length) == 5
    assert to_steps("1e3 samples", **length) == 10
    assert to_steps("1.5e1 steps", **length) == 15


def test_a_run_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"shorter than one step: got 1 epoch of 10 samples .* 32; hint"):
        build(cosine="1 epoch", warmup="0 steps", batch=32, samples=10)


def test_a_warmup_longer_than_the_cosine_is_refused():
    with pytest.raises(UserError, match="warmup is longer"):
        build(cosine="5 epochs", warmup="6 epochs")


@given(every=st.integers(0, 50), total=st.integers(1, 200))
def test_is_time_every_so_often_and_at_the_end(every, total):
    due = [step for step in range(1, total + 1) if is_time(step, every, total)]
    assert due[-1] == total
    assert set(due) - {total} == {step for step in range(1, total) if step % max(every, 1) == 0}
