"""Who reads what: the order of an epoch, and each rank's share of a global batch. Pure functions of numbers.

An epoch's order is a bijection from positions [0, N) to samples; it knows nothing of batches, ranks, workers:

    shards     S2 . . . . . . . | S0 . . . . . | S1 . . . . . . .   shuffled, laid end to end: the line
    lanes      lane 1 | lane 3 | lane 0 | lane 2                    the line is cut; lanes lie on it shuffled
    a lane     run run run run run                                  consecutive samples, `run_bytes` together
    mixed      runs in random order, samples drawn from the `open_runs` runs that are open at a time
    position   p is entry p // L of lane p mod L                    so lane j has ceil((N - j) / L) entries

A rank that always takes the same lanes therefore reads runs of a few megabytes one after another.
"""

import math

import numpy as np
import numpy.typing as npt

from gcvit.errors import UserError

_BLOCK_SAMPLES = 1 << 18  # lanes are mixed in blocks of about so many samples, to bound memory and fit caches
_ORDER_STREAM = 1  # keeps the draws of the order apart from others that begin with the same seed


def order_epoch(
    first: npt.NDArray[np.integer],
    length: npt.NDArray[np.integer],
    *,
    seed: int,
    epoch: int,
    lanes: int,
    run_bytes: int,
    open_runs: int,
) -> npt.NDArray[np.uint32]:
    """The sample at each position of an epoch: a permutation of [0, N), uint32.

    `first` [num_shards + 1] holds the first sample of each shard and N, `length` [N] each sample's bytes.
    Equal arguments give equal orders on every machine: sorting is stable, one PCG64 generator draws.
    """
    rng = np.random.default_rng(np.random.SeedSequence((seed, _ORDER_STREAM, epoch)))
    line = _lay_shards(np.asarray(first, dtype=np.int64), rng)
    num_samples = len(line)
    if not num_samples:
        return line
    width = -(-num_samples // lanes)
    lane_size = (num_samples - np.arange(lanes) + lanes - 1) // lanes  # some 0 where lanes exceed samples
    # Neighbours on the line are alike where a source is sorted; shuffled, they do not become mixup partners.
    lane_at = rng.permutation(lanes)
    lane_end = np.cumsum(lane_size[lane_at])
    order = np.empty((width, lanes), dtype=np.uint32)
    block = max(1, _BLOCK_SAMPLES // width)
    for low in range(0, lanes, block):
        lanes_here = lane_at[low : low + block]
        sizes = lane_size[lanes_here]
        end = lane_end[low + len(sizes) - 1]
        samples = line[end - sizes.sum() : end]
        order[:, lanes_here] = _mix_lanes(samples, length[samples], sizes, width, run_bytes, open_runs, rng).T
    return order.reshape(-1)[:num_samples]


def _lay_shards(first: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.uint32]:
    """Sample numbers of all shards, end to end in random order: uint32 [N]."""
    assert first[-1] < 1 << 32
    shards = rng.permutation(len(first) - 1)
    sizes = np.diff(first)[shards]
    # From a place on the line to a sample number; negative shifts wrap around, as uint32 sums do.
    shift = (first[shards] - (np.cumsum(sizes) - sizes)).astype(np.uint32)
    return np.arange(first[-1], dtype=np.uint32) + np.repeat(shift, sizes)


def _mix_lanes(
    samples: npt.NDArray[np.uint32],
    length: npt.NDArray[np.integer],
    sizes: npt.NDArray[np.integer],
    width: int,
    run_bytes: int,
    open_runs: int,
    rng: np.random.Generator,
) -> npt.NDArray[np.uint32]:
    """Permute and mix the runs of some lanes that follow each other on the line.

    `samples` and their bytes `length` are [sizes.sum()]; returns [len(sizes), width], whose rows are padded.
    """
    shape = (len(sizes), width)
    filled = np.arange(width) < sizes[:, None]
    sample_grid = np.zeros(shape, dtype=np.uint32)
    sample_grid[filled] = samples
    bytes_grid = np.zeros(shape, dtype=np.int64)
    bytes_grid[filled] = length
    run = (np.cumsum(bytes_grid, axis=1) - bytes_grid) // run_bytes
    # Number runs without gaps: a sample larger than run_bytes skips some.
    run[:, 1:] = np.cumsum(run[:, 1:] != run[:, :-1], axis=1)
    run[:, 0] = 0
    num_runs = int(run.max()) + 1
    place = rng.permuted(np.broadcast_to(np.arange(num_runs), (len(sizes), num_runs)), axis=1)
    # The run at place j has its samples at times in [j, j + open_runs): no more than open_runs ever overlap.
    time = np.take_along_axis(place, run, axis=1) + open_runs * rng.random(shape)
    time[~filled] = np.inf
    return np.take_along_axis(sample_grid, np.argsort(time, axis=1, kind="stable"), axis=1)


def deal_share(
    global_batch_size: int, world_size: int, rank: int, *, lanes: int, paired: bool
) -> npt.NDArray[np.int64]:
    """Positions within the global batch that `rank` takes, ascending; `paired` keeps 2k and 2k+1 together.

    Shares differ by at most one pair (or one sample). They are cut lane by lane, so that a rank holds whole
    lanes through an epoch wherever the numbers allow it (`holds_whole_lanes`).
    """
    unit = 2 if paired else 1
    num_units = global_batch_size // unit
    assert num_units * unit == global_batch_size, "the config refuses an odd batch where samples are paired"
    by_lane = np.arange(num_units).reshape(-1, _lane_period(num_units, lanes // unit)).T.reshape(-1)
    low, high = _cut_batch(num_units, world_size)[rank : rank + 2]
    units = np.sort(by_lane[low:high])
    return (units[:, None] * unit + np.arange(unit)).reshape(-1)


def holds_whole_lanes(global_batch_size: int, world_size: int, *, lanes: int, paired: bool) -> bool:
    """Whether each lane is one rank's through an epoch, so that ranks read runs from begin to end, and alone.

    So it is where the world divides the lanes and the lanes divide the batch, and in some other cases.
    """
    unit = 2 if paired else 1
    num_units = global_batch_size // unit
    slots_per_lane = num_units // _lane_period(num_units, lanes // unit)
    return lanes % unit == 0 and all(cut % slots_per_lane == 0 for cut in _cut_batch(num_units, world_size))


def _cut_batch(num_units: int, world_size: int) -> list[int]:
    return [num_units * rank // world_size for rank in range(world_size + 1)]


def _lane_period(num_units: int, lane_units: int) -> int:
    # Slot k of the batch meets only lanes that are congruent to k (plus a constant of the epoch) modulo this.
    return math.gcd(num_units, lane_units)


def cut_micro_batches(share: npt.NDArray[np.int64], num_steps: int, size: int) -> list[npt.NDArray[np.int64]]:
    """`num_steps` pieces of `share` of `size` each; the last ones may be short or empty."""
    assert len(share) <= num_steps * size
    return [share[step * size : (step + 1) * size] for step in range(num_steps)]


def micro_batch_capacity(global_batch_size: int, world_size: int, micro_batch_size: int | None, *, paired: bool) -> int:
    """Samples of a full micro-batch: `micro_batch_size`, even where `paired`, at most the largest share.

    Errors: UserError where a pair does not fit into a micro-batch.
    """
    unit = 2 if paired else 1
    largest_share = -(-(global_batch_size // unit) // world_size) * unit
    if micro_batch_size is None:
        return largest_share
    if micro_batch_size < unit:
        raise UserError(
            "trainer.micro_batch_size holds no pair of samples, which mixup and cutmix need",
            got=micro_batch_size,
            allowed="2 or more, or null",
            cure="raise it, or write augment.mix=null",
        )
    return min(micro_batch_size // unit * unit, largest_share)


def num_micro_steps(global_batch_size: int, world_size: int, micro_batch_size: int | None, paired: bool) -> int:
    """Micro-steps in an optimizer step: the same on all ranks, though their shares may differ by a pair."""
    unit = 2 if paired else 1
    largest_share = -(-(global_batch_size // unit) // world_size) * unit
    return -(-largest_share // micro_batch_capacity(global_batch_size, world_size, micro_batch_size, paired=paired))
