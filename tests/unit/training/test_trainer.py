"""The loop's own parts: what the model draws, and the part of a rank without samples. The loop: the golden runs."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gcvit.config.load import load_config
from gcvit.data.batch import Batch
from gcvit.data.transforms import DeviceAugment
from gcvit.model.from_config import build_model
from gcvit.monitoring.step_timer import StepTimer
from gcvit.optim.loss import soft_target_loss
from gcvit.runtime.distributed import World
from gcvit.training.trainer import copy_to_device, seed_drop_path
from tests.helpers.launching import ROOT
from tests.helpers.streaming import whole_batch

PLACES = st.tuples(*[st.integers(0, 2**40)] * 4)  # seed, step, micro-step, rank


def draws(*place: int) -> list[float]:
    seed_drop_path(*place)
    return torch.rand(4, dtype=torch.float64).tolist()


@given(place=PLACES)
def test_what_the_model_draws_depends_on_its_place_alone(place):
    first = draws(*place)
    torch.rand(3)
    assert draws(*place) == first


@given(place=PLACES, changed=st.integers(0, 3), value=st.integers(0, 2**40))
def test_another_place_draws_otherwise(place, changed, value):
    assume(value != place[changed])
    assert draws(*place) != draws(*place[:changed], value, *place[changed + 1 :])


@given(place=PLACES, one=st.integers(0, 3), other=st.integers(0, 3))
def test_the_order_of_the_arguments_counts(place, one, other):
    """Step 1 of rank 2 is not step 2 of rank 1."""
    swapped = list(place)
    swapped[one], swapped[other] = swapped[other], swapped[one]
    assume(tuple(swapped) != place)
    assert draws(*place) != draws(*swapped)


def test_neighbouring_places_draw_otherwise():
    places = [(seed, step, micro, rank) for seed in (0, 1) for step in range(9) for micro in (0, 1) for rank in (0, 1)]
    assert len({tuple(draws(*place)) for place in places}) == len(places)


# ---- a rank without samples ----------------------------------------------------------------------


def draw_batch(num_images: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return whole_batch(
        images=torch.randint(0, 256, (num_images, 3, 32, 32), dtype=torch.uint8, generator=generator),
        labels=torch.arange(num_images) % 4,
        positions=torch.arange(num_images),
        erase=torch.zeros(num_images, 5, dtype=torch.int64),
    )


@pytest.mark.gpu
def test_a_rank_without_samples_takes_part_with_exact_zeros(world: World):
    config, _ = load_config(ROOT / "tests/helpers/golden.yaml")
    augment = DeviceAugment(config.augment, config.data, num_classes=4, seed=config.seed)
    model = build_model(config.model).train().to(world.device)
    model.init_weights(seed=0)

    batches, timer = (draw_batch(4), draw_batch(0)), StepTimer(world.device)
    passes = list(copy_to_device(batches, augment, 0, config.model, world.device, timer))
    assert [tuple(images.shape) for images, _ in passes] == [(4, 3, 32, 32), (1, 3, 32, 32)]
    assert [tuple(targets.shape) for _, targets in passes] == [(4, 4), (1, 4)]

    largest = []
    for images, targets in passes:
        assert images.device.type == targets.device.type == world.device.type
        model.zero_grad()
        loss = soft_target_loss(model(images), targets).sum()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters()), "a parameter that takes no part"
        largest.append((loss.item(), max(p.grad.abs().max().item() for p in model.parameters())))
    (loss, gradient), nothing = largest
    assert loss > 0
    assert gradient > 0
    assert nothing == (0.0, 0.0)
