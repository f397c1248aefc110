"""How a global batch is divided: shares partition it, micro-steps are equally many, lanes stay whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcvit.data.batch_plan import BatchPlan
from gcvit.errors import UserError

worlds = st.integers(1, 64)


@given(num_pairs=st.integers(1, 300), world_size=worlds, lanes=st.integers(1, 128), paired=st.booleans())
@settings(max_examples=200, deadline=None)
def test_shares_partition_the_batch(num_pairs, world_size, lanes, paired):
    unit = 2 if paired else 1
    batch_size = num_pairs * unit
    plan = BatchPlan(batch_size, world_size, None, paired)
    shares = [plan.share(rank, lanes) for rank in range(world_size)]
    assert plan.largest_share == max(map(len, shares))
    assert plan.has_empty_shares == (min(map(len, shares)) == 0)
    assert sorted(np.concatenate(shares).tolist()) == list(range(batch_size))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= unit
    for share in shares:
        assert (np.diff(share) > 0).all()
        if paired:
            assert np.array_equal(share[::2] ^ 1, share[1::2])


@given(
    num_units=st.integers(1, 300),
    world_size=worlds,
    micro=st.integers(2, 50) | st.none(),
    paired=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_all_ranks_take_equally_many_micro_steps(num_units, world_size, micro, paired):
    unit = 2 if paired else 1
    batch_size = num_units * unit
    plan = BatchPlan(batch_size, world_size, micro, paired)
    num_steps, capacity = plan.num_micro_steps, plan.capacity
    assert micro is None or capacity <= micro
    for rank in range(world_size):
        share, pieces = plan.share(rank, lanes=16), plan.micro_batches(rank, lanes=16)
        assert len(pieces) == num_steps
        assert np.array_equal(np.concatenate(pieces), share)
        assert all(len(piece) <= capacity and len(piece) % unit == 0 for piece in pieces)
    largest = -(-num_units // world_size) * unit
    assert (num_steps - 1) * capacity < largest <= num_steps * capacity  # no step is empty on every rank


@pytest.mark.parametrize(
    ("batch_size", "world_size", "micro", "paired", "expected"),
    [
        (32, 3, None, True, 1),
        (32, 3, 4, True, 3),
        (32, 2, 5, True, 4),
        (32, 1, 1, False, 32),
        (2, 5, None, True, 1),
    ],
)
def test_num_micro_steps(batch_size, world_size, micro, paired, expected):
    assert BatchPlan(batch_size, world_size, micro, paired).num_micro_steps == expected


def test_shares_of_three_ranks():
    def sizes(paired):
        return [len(BatchPlan(32, 3, None, paired).share(rank, lanes=1024)) for rank in range(3)]

    assert sorted(sizes(paired=True)) == [10, 10, 12]
    assert sorted(sizes(paired=False)) == [10, 11, 11]


def test_a_micro_batch_must_hold_a_pair():
    plan = BatchPlan(32, 2, 1, paired=True)
    with pytest.raises(UserError, match=r"micro_batch_size.*got 1.*mix=null"):
        _ = plan.num_micro_steps


@given(pairs=st.integers(1, 300), world_size=st.integers(1, 9), most=st.integers(1, 700))
def test_a_share_is_split_evenly(pairs, world_size, most):
    plan = BatchPlan(2 * pairs, world_size, None, paired=True)
    size, share = plan.split_evenly(most), plan.largest_share
    assert 0 < size <= max(most, 2)
    assert size % 2 == 0
    steps = -(-share // size)
    assert steps == -(-share // max(most // 2 * 2, 2))
    assert steps == BatchPlan(2 * pairs, world_size, size, paired=True).num_micro_steps
    assert (size - 2) * steps < share  # no smaller one would do


@pytest.mark.parametrize(
    ("batch_size", "world_size", "whole"),
    [
        (1024, 32, True),
        (4096, 32, True),
        (512, 8, True),
        (1024, 3, True),
        (2048, 3, False),
        (1000, 32, False),
        (3072, 512, True),
    ],
)
@pytest.mark.parametrize("paired", [True, False])
def test_ranks_hold_whole_lanes_where_the_numbers_allow(batch_size, world_size, whole, paired):
    lanes, num_samples, epoch = 1024, 20_001, 3
    plan = BatchPlan(batch_size, world_size, None, paired)
    assert plan.holds_whole_lanes(lanes) == whole
    owners = [set() for _ in range(lanes)]
    shares = [plan.share(rank, lanes) for rank in range(world_size)]
    for start in range(0, (epoch + 2) * num_samples, batch_size):
        for rank, share in enumerate(shares):
            in_epoch, position = np.divmod(start + share, num_samples)
            for lane in np.unique(position[in_epoch == epoch] % lanes):
                owners[lane].add(rank)
    assert (max(map(len, owners)) == 1) == whole
