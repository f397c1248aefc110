"""The number of devices changes only micro-batch and accumulation: a golden table over world size x accumulation."""

import numpy as np
import pytest

from gcvit.config.load import load_config
from gcvit.data.batch_plan import BatchPlan
from gcvit.optim.lr_schedule import build_schedule, to_samples
from gcvit.training.ema import Ema
from tests.helpers.launching import ROOT

CONFIG = load_config(ROOT / "configs/gc_vit_large_fsdp.yaml")[0]
BATCH, IMAGES = 1024, 1_281_167
MICRO_BATCHES = (8, 32, 128, None)
# Of each world: images of a full micro-batch x micro-steps, in the order of MICRO_BATCHES.
GOLDEN = {
    1: ("8 x 128", "32 x 32", "128 x 8", "1024 x 1"),
    2: ("8 x 64", "32 x 16", "128 x 4", "512 x 1"),
    3: ("8 x 43", "32 x 11", "128 x 3", "342 x 1"),  # 512 pairs on three ranks: two of 171 and one of 170
    8: ("8 x 16", "32 x 4", "128 x 1", "128 x 1"),
    12: ("8 x 11", "32 x 3", "86 x 1", "86 x 1"),
    32: ("8 x 4", "32 x 1", "32 x 1", "32 x 1"),
    64: ("8 x 2", "16 x 1", "16 x 1", "16 x 1"),
    256: ("4 x 1", "4 x 1", "4 x 1", "4 x 1"),
}
# What is the same in all of them: updates, learning rates at some of them, the decay of the EMA.
UPDATES = 400_364
RATES = {0: 1e-6, 25_022: 4.9998002e-3, 25_023: 4.9488519e-3, 200_000: 2.3796848e-3, 400_363: 5e-6}
DECAY = 0.99979999


@pytest.mark.parametrize("world_size", GOLDEN)
def test_the_golden_table(world_size):
    found = []
    for micro_batch in MICRO_BATCHES:
        plan = BatchPlan(BATCH, world_size, micro_batch, paired=True)
        found.append(f"{plan.capacity} x {plan.num_micro_steps}")
    assert tuple(found) == GOLDEN[world_size]


@pytest.mark.parametrize("world_size", GOLDEN)
@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_every_image_of_the_batch_is_taken_once(world_size, micro_batch):
    plan = BatchPlan(BATCH, world_size, micro_batch, paired=True)
    micro_batches = [positions for rank in range(world_size) for positions in plan.micro_batches(rank, lanes=1024)]
    assert len(micro_batches) == world_size * plan.num_micro_steps
    assert sorted(np.concatenate(micro_batches).tolist()) == list(range(BATCH))


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_the_recipe_does_not_know_of_devices(micro_batch):
    """Neither the rate nor the EMA is computed from anything that the number of devices decides."""
    flags = {"trainer.micro_batch_size": micro_batch}
    config, notices = load_config(ROOT / "configs/gc_vit_large_fsdp.yaml", flags=flags)
    assert notices == []
    length = {"global_batch_size": config.global_batch_size, "samples_per_epoch": IMAGES}
    schedule = build_schedule(config.schedule, config.optim, **length)
    assert schedule.total_steps == UPDATES
    assert {step: schedule.lr(step) for step in RATES} == pytest.approx(RATES, rel=1e-4)
    assert config.ema is not None
    ema = Ema({}, half_life_samples=to_samples(config.ema.half_life, **length), global_batch_size=BATCH)
    assert ema.decay == pytest.approx(DECAY, rel=1e-7)


@pytest.mark.parametrize(
    ("batch", "scaling", "rate", "updates"),
    [
        (1024, "none", 5e-3, 400_364),
        (4096, "none", 5e-3, 100_091),
        (4096, "sqrt", 1e-2, 100_091),
        (4096, "linear", 2e-2, 100_091),
        (256, "sqrt", 2.5e-3, 1_601_459),
        (256, "linear", 1.25e-3, 1_601_459),
    ],
)
def test_another_global_batch_is_another_recipe_and_says_so(batch, scaling, rate, updates):
    overrides = [f"global_batch_size={batch}", f"optim.lr_scaling={scaling}"]
    config, notices = load_config(ROOT / "configs/gc_vit_large_fsdp.yaml", overrides)
    length = {"global_batch_size": batch, "samples_per_epoch": IMAGES}
    schedule = build_schedule(config.schedule, config.optim, **length)
    assert config.optim.lr == pytest.approx(rate)
    assert schedule.total_steps == updates
    assert len(notices) == (batch != 1024)
    for notice in notices:
        factor = batch / 1024
        for word in (f"{batch} instead of", scaling, f"{rate:g}", f"{1 / factor:.3g} times as many updates"):
            assert word in notice
        # AdamW decays by rate times decay, and the rate is what scaling changes.
        assert f"decays the weights {'as before' if rate == 5e-3 else f'{rate / 5e-3:.3g} times as much'};" in notice
    # In samples, warm-up and EMA are as long as ever.
    assert config.ema is not None
    assert to_samples(config.ema.half_life, **length) == to_samples(
        CONFIG.ema.half_life, **length | {"global_batch_size": 1024}
    )
    assert schedule.warmup_steps * batch == pytest.approx(20 * IMAGES, rel=1e-4)
