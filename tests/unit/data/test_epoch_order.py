import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from gcvit.data.epoch_order import EpochOrder
from tests.helpers.streaming import order_epoch

SIZES = {"lanes": 8, "chunk_bytes": 1000, "shuffle_chunks": 3}
shard_sizes = st.lists(st.integers(0, 60), min_size=1, max_size=9)
GOLDEN_ORDER = [14, 1, 8, 13, 0, 7, 15, 4, 9, 12, 3, 6, 10, 2, 5, 11]


def first_of(sizes: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def random_lengths(num_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 500, num_samples).astype(np.uint32)


@given(
    sizes=shard_sizes,
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
    lanes=st.integers(1, 70),
    chunk_bytes=st.integers(1, 5000),
    shuffle_chunks=st.integers(1, 6),
)
@settings(max_examples=200, deadline=None)
def test_order_is_a_permutation(sizes, seed, epoch, lanes, chunk_bytes, shuffle_chunks):
    order = order_epoch(
        first_of(sizes),
        random_lengths(sum(sizes)),
        seed=seed,
        epoch=epoch,
        lanes=lanes,
        chunk_bytes=chunk_bytes,
        shuffle_chunks=shuffle_chunks,
    )
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(sum(sizes)))


def test_order_is_pure_and_changes_with_seed_and_epoch():
    first, length = first_of([400, 600]), random_lengths(1000)
    order = order_epoch(first, length, seed=3, epoch=5, **SIZES)
    assert np.array_equal(order, order_epoch(first, length, seed=3, epoch=5, **SIZES))
    for seed, epoch in ((4, 5), (3, 6), (5, 3)):
        other = order_epoch(first, length, seed=seed, epoch=epoch, **SIZES)
        assert np.mean(order == other) < 0.02


def test_order_is_the_same_on_every_machine():
    """A changed order makes a resumed run repeat and skip samples: this list may change only on purpose."""
    order = order_epoch(
        first_of([5, 4, 7]), np.full(16, 10), seed=1, epoch=2, lanes=3, chunk_bytes=20, shuffle_chunks=2
    )
    assert order.tolist() == GOLDEN_ORDER


@given(
    num_samples=st.integers(1, 400),
    lanes=st.integers(1, 8),
    chunk_bytes=st.integers(200, 5000),
    shuffle_chunks=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_lanes_are_stretches_of_the_line_with_few_open_runs(num_samples, lanes, chunk_bytes, shuffle_chunks):
    length = random_lengths(num_samples)
    order = order_epoch(
        first_of([num_samples]),
        length,
        seed=0,
        epoch=0,
        lanes=lanes,
        chunk_bytes=chunk_bytes,
        shuffle_chunks=shuffle_chunks,
    )
    for lane in range(min(lanes, num_samples)):
        samples = order[lane::lanes].astype(np.int64)
        low, high = samples.min(), samples.max()
        assert high - low + 1 == len(samples)  # one shard: a lane is a range of samples
        run_of = np.concatenate([[0], np.cumsum(length[low:high])]) // chunk_bytes
        runs = run_of[samples - low]
        spans = [np.flatnonzero(runs == run)[[0, -1]] for run in np.unique(runs)]
        num_open = [sum(begin <= slot <= end for begin, end in spans) for slot, _ in enumerate(samples)]
        assert max(num_open) <= shuffle_chunks


@st.composite
def orders(draw):
    """An order's arguments, and N."""
    sizes = draw(shard_sizes)
    return {
        "first": first_of(sizes),
        "length": random_lengths(sum(sizes)),
        "seed": draw(st.integers(0, 99)),
        "epoch": draw(st.integers(0, 9)),
        "lanes": draw(st.integers(1, 12)),
        "chunk_bytes": draw(st.integers(1, 5000)),
        "shuffle_chunks": draw(st.integers(1, 5)),
    }, sum(sizes)


@given(arguments=orders(), data=st.data())
@settings(max_examples=100, deadline=None)
def test_lanes_planned_apart_are_the_same_lanes(arguments, data):
    """Whoever plans which lanes first: each rank plans its own."""
    arguments, num_samples = arguments
    whole = order_epoch(**arguments)
    apart = EpochOrder(**arguments)
    for lanes in data.draw(st.lists(st.lists(st.integers(0, arguments["lanes"] - 1), min_size=1), max_size=4)):
        apart.plan(np.array(lanes))
    positions = np.array(data.draw(st.permutations(range(num_samples))), dtype=np.int64)
    for some in np.array_split(positions, 3):
        assert np.array_equal(apart.lookup(some).samples, whole[some])


@given(arguments=orders())
@settings(max_examples=100, deadline=None)
def test_chunks_are_read_once_and_dropped_after_their_last_sample(arguments):
    arguments, num_samples = arguments
    found = EpochOrder(**arguments).lookup(np.arange(num_samples))
    lanes = np.arange(num_samples) % arguments["lanes"]
    assert ((found.chunk_begin <= found.samples) & (found.samples < found.chunk_end)).all()
    shard = np.searchsorted(arguments["first"], found.samples, side="right")
    assert np.array_equal(shard, np.searchsorted(arguments["first"], found.chunk_begin, side="right"))
    assert np.array_equal(shard, np.searchsorted(arguments["first"], found.chunk_end - 1, side="right"))
    chunks = set(zip(found.chunk_begin.tolist(), found.chunk_end.tolist(), strict=True))
    assert sum(end - begin for begin, end in chunks) == num_samples  # chunks neither overlap nor leave out
    for begin, end in chunks:
        of_chunk = np.flatnonzero(found.chunk_begin == begin)
        assert len(set(lanes[of_chunk])) == 1
        assert sorted(found.samples[of_chunk]) == list(range(begin, end))
        assert found.is_last[of_chunk].tolist() == [False] * (end - begin - 1) + [True]
        bytes_of_chunk = arguments["length"][begin:end].sum()
        assert bytes_of_chunk < arguments["chunk_bytes"] + arguments["length"][begin:end].max()
    for lane in range(min(arguments["lanes"], num_samples)):
        number = found.chunk_number[lanes == lane] - lane
        assert sorted(set(number.tolist())) == list(range(number.max() + 1))
        # A chunk enters the shuffle buffer only when all before it are in it or done: at most shuffle_chunks at once.
        newest = np.maximum.accumulate(number)
        assert (newest - number < arguments["shuffle_chunks"]).all()


@given(arguments=orders(), data=st.data())
@settings(max_examples=100, deadline=None)
def test_shards_come_in_the_order_of_their_first_use(arguments, data):
    arguments, num_samples = arguments
    lanes = np.array(data.draw(st.lists(st.integers(0, arguments["lanes"] - 1), min_size=1)))
    order = EpochOrder(**arguments)
    positions = np.flatnonzero(np.isin(np.arange(num_samples) % arguments["lanes"], lanes))
    shard = np.searchsorted(arguments["first"], order.lookup(positions).samples, side="right") - 1
    assert sorted(order.shards(lanes)) == sorted(set(shard.tolist()))
    start_entry = data.draw(st.integers(0, 30))
    if num_samples:
        wanted = set(shard[positions // arguments["lanes"] >= start_entry].tolist())
        assert wanted <= set(order.shards(lanes, start_entry))


def test_a_lane_uses_few_shards_at_a_time():
    """So that a cache of whole shards needs to hold few of them at a time."""
    num_samples, shard = 40_000, 200
    order = EpochOrder(
        np.arange(0, num_samples + 1, shard),
        np.full(num_samples, 100),
        seed=0,
        epoch=0,
        lanes=4,
        chunk_bytes=500,  # 40 chunks a shard: 6.4 shards in 256 chunks, 50 in a lane
        shuffle_chunks=3,
    )
    for lane in range(4):
        shards = order.lookup(np.arange(lane, num_samples, 4)).samples // shard
        spans = [np.flatnonzero(shards == one)[[0, -1]] for one in np.unique(shards)]
        num_open = [sum(begin <= entry <= end for begin, end in spans) for entry in range(len(shards))]
        assert max(num_open) <= 16
        assert np.mean(num_open) < 9


def test_a_resumed_epoch_brings_the_shards_that_it_needs():
    first, length = np.arange(0, 40_001, 100), random_lengths(40_000)
    order = EpochOrder(first, length, seed=0, epoch=0, lanes=4, chunk_bytes=500, shuffle_chunks=3)
    lane = order.lookup(np.arange(2, 40_000, 4)).samples // 100
    for start_entry in (0, 3000, 9000):
        listed = order.shards(np.array([2]), start_entry)
        assert set(lane[start_entry:].tolist()) <= set(listed)
        # Windows follow each other: what comes first is needed early.
        assert set(listed[:5]) <= set(lane[start_entry // 4 :].tolist())
    assert len(listed) < 0.4 * len(set(lane.tolist()))


def chi_square_failures(order: np.ndarray, label: np.ndarray, batch_size: int) -> float:
    """Share of batches whose class histogram is beyond the 99th percentile of chi-square."""
    num_classes = label.max() + 1
    num_batches = len(order) // batch_size
    batches = label[order[: num_batches * batch_size]].reshape(num_batches, batch_size)
    expected = np.bincount(label) / len(label) * batch_size
    counts = np.stack([np.bincount(batch, minlength=num_classes) for batch in batches])
    statistic = ((counts - expected) ** 2 / expected).sum(axis=1)
    return float(np.mean(statistic > chi2.ppf(0.99, num_classes - 1)))


@pytest.mark.parametrize(
    ("num_samples", "num_shards", "lanes", "shuffle_chunks", "batch_size"),
    [
        (1437, 1, 1024, 2, 256),
        (1437, 10, 1024, 2, 64),
        (100_000, 7, 1024, 2, 1024),
        (400_000, 400, 1024, 2, 1024),
        (400_000, 4000, 1024, 2, 1024),
        (400_000, 400, 1024, 2, 256),
        (400_000, 400, 1024, 4, 4096),
        (400_000, 400, 256, 2, 250),
    ],
)
def test_batches_of_a_source_sorted_by_class_are_fair(num_samples, num_shards, lanes, shuffle_chunks, batch_size):
    num_classes = 10 if num_samples < 10_000 else 50
    label = np.arange(num_samples) * num_classes // num_samples
    first = np.linspace(0, num_samples, num_shards + 1).astype(np.int64)
    length = np.full(num_samples, 110_000 if num_samples > 10_000 else 1500)
    sizes = {"lanes": lanes, "chunk_bytes": 2_000_000, "shuffle_chunks": shuffle_chunks}
    failures = [
        chi_square_failures(order_epoch(first, length, seed=0, epoch=epoch, **sizes), label, batch_size)
        for epoch in range(3)
    ]
    num_batches = 3 * (num_samples // batch_size)
    assert np.mean(failures) <= 0.01 + 3 * np.sqrt(0.01 / num_batches)
    assert chi_square_failures(np.arange(num_samples), label, batch_size) == 1.0


def test_mixup_partners_of_a_source_sorted_by_class_are_strangers():
    label = np.arange(200_000) * 100 // 200_000
    order = order_epoch(
        np.arange(0, 200_001, 1000),
        np.full(200_000, 110_000),
        seed=0,
        epoch=0,
        lanes=1024,
        chunk_bytes=2_000_000,
        shuffle_chunks=2,
    )
    pairs = label[order].reshape(-1, 2)
    # 100 classes: one pair in a hundred by chance; the same 512 pairs of lanes last all epoch: a wide spread.
    assert np.mean(pairs[:, 0] == pairs[:, 1]) < 0.03
