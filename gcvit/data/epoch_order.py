"""The order in which an epoch reads its samples: a pure function of numbers.

An epoch's order is a bijection from positions [0, N) to samples; it knows nothing of batches, ranks, workers:

    shards     S2 . . . . . . . | S0 . . . . . | S1 . . . . . . .   shuffled, laid end to end: the line
    lanes      lane 1 | lane 3 | lane 0 | lane 2                    the line is cut; lanes lie on it shuffled
    a lane     run run run | run run                                consecutive samples, `chunk_bytes` together
    mixed      256 runs in random order at a time, samples drawn from the `shuffle_chunks` runs that are open
    position   p is entry p // L of lane p mod L                    so lane j has ceil((N - j) / L) entries

A rank that always takes the same lanes therefore reads runs of a few megabytes, each once, from a few shards at a
time. What is random within a lane comes from hashes of places on the line, not from a generator's
stream: any lanes can be planned apart from the others, so a rank plans its own alone.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_BLOCK_SAMPLES = 1 << 18  # lanes are planned in blocks of about so many samples, to bound memory and fit caches
_WINDOW_RUNS = 256  # of a lane, which are shuffled together: more mix better, fewer ask less of a cache of shards
_ORDER_STREAM = 1  # keeps the draws of the order apart from others that begin with the same seed
_PADDING = np.uint64(2**64 - 1)  # sorts behind everything

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Picks:
    """What lies at some positions of an epoch; every array is int64 or bool [b].

    `samples[i]` belongs to the run of samples `begin[i]` to `end[i]` (exclusive), which lie together in one shard;
    `opened[i]` numbers the runs of a lane in the order in which they are opened, plus the lane's number, and `last`
    tells that no later position of this epoch needs the run.
    """

    samples: Places
    begin: Places
    end: Places
    opened: Places
    last: npt.NDArray[np.bool_]


class EpochOrder:
    """The order of one epoch. Lanes are planned when they are first asked for.

    `first` [num_shards + 1] holds the first sample of each shard and N, `length` [N] each sample's bytes. Equal
    arguments give equal orders on every machine, however many lanes are planned together: all keys are distinct
    integers. Takes 4 bytes a sample of the planned lanes, and some for each run.
    """

    def __init__(
        self,
        first: npt.NDArray[np.integer],
        length: npt.NDArray[np.integer],
        *,
        seed: int,
        epoch: int,
        lanes: int,
        chunk_bytes: int,
        shuffle_chunks: int,
    ):
        rng = np.random.default_rng(np.random.SeedSequence((seed, _ORDER_STREAM, epoch)))
        first = np.asarray(first, dtype=np.int64)
        self.num_samples, self.lanes = int(first[-1]), lanes
        assert self.num_samples < 1 << 32
        self._length, self._run_bytes, self._open_runs = length, chunk_bytes, shuffle_chunks
        self._keys = rng.integers(2**64, size=2, dtype=np.uint64)
        self._shards = rng.permutation(len(first) - 1)
        sizes = np.diff(first)[self._shards]
        self._shard_end = np.cumsum(sizes)
        self._shard_shift = first[self._shards] - (self._shard_end - sizes)  # from a place on the line to a sample
        # Neighbours on the line are alike where a source is sorted; shuffled, they do not become mixup partners.
        lane_at = rng.permutation(lanes)
        self._lane_size = (self.num_samples - np.arange(lanes) + lanes - 1) // lanes  # some 0 where N < lanes
        self._lane_begin = np.empty(lanes, dtype=np.int64)
        self._lane_begin[lane_at] = np.cumsum(self._lane_size[lane_at]) - self._lane_size[lane_at]
        width = -(-self.num_samples // lanes)
        self._index_bits = max(1, width.bit_length())
        self._time_bits = min(16, 62 - 2 * self._index_bits)  # of a sample's time within the run that opens then
        assert self._time_bits > 0, "2**31 samples in a lane"
        # Rows of lanes that are never planned are never touched, and so take no memory.
        self._places = np.empty((lanes, width), dtype=np.uint32)
        self._planned = np.zeros(lanes, dtype=bool)
        self._runs = np.empty((5, 0), dtype=np.uint32)  # begin, end, opened, last entry, lane: sorted by begin

    def plan(self, lanes: Places) -> None:
        """Work out the order of these lanes, where that is still to be done."""
        lanes = np.unique(lanes)
        lanes = lanes[~self._planned[lanes]]
        if not len(lanes):
            return
        runs = [self._runs]
        block = max(1, _BLOCK_SAMPLES // max(1, self._places.shape[1]))
        runs += [self._plan_block(lanes[low : low + block]) for low in range(0, len(lanes), block)]
        self._runs = np.concatenate(runs, axis=1)
        self._runs = self._runs[:, np.argsort(self._runs[0], kind="stable")]
        self._planned[lanes] = True

    def take(self, positions: Places) -> Picks:
        """What lies at `positions` [b] in [0, N)."""
        entries, lanes = np.divmod(positions, self.lanes)
        self.plan(lanes)
        places = self._places[lanes, entries].astype(np.int64)
        run = np.searchsorted(self._runs[0], places, side="right") - 1
        begin, end, opened, last, _ = self._runs[:, run].astype(np.int64)
        shift = self._shift(places)
        return Picks(places + shift, begin + shift, end + shift, opened + lanes, entries == last)

    def shards(self, lanes: Places, start_entry: int = 0) -> list[int]:
        """Shards that these lanes need from `start_entry` on, and perhaps more, nearly in the order of first use."""
        starts = np.append(0, self._shard_end)
        # What is left of a window of runs may lie anywhere in it.
        if start_entry:
            mean_length = max(1.0, float(np.mean(self._length)))
            start_entry = max(0, start_entry - 2 * _WINDOW_RUNS * math.ceil(self._run_bytes / mean_length))
        found: dict[int, int] = {}
        for lane in np.unique(lanes):
            begin, size = self._lane_begin[lane], self._lane_size[lane]
            if start_entry >= size:
                continue
            low, high = np.searchsorted(self._shard_end, [begin + start_entry, begin + size - 1], side="right")
            for at in range(low, high + 1):
                if starts[at] < starts[at + 1]:  # not empty
                    entry, shard = max(0, int(starts[at] - begin)), int(self._shards[at])
                    found[shard] = min(entry, found.get(shard, entry))
        return sorted(found, key=lambda shard: (found[shard], shard))

    def _shift(self, places: Places) -> Places:
        return self._shard_shift[np.searchsorted(self._shard_end, places, side="right")]

    def _stretches(self, begin: int, size: int) -> tuple[Places, Places]:
        """Sample numbers at `size` places of the line from `begin` on, and which of them begin another shard."""
        low, high = np.searchsorted(self._shard_end, [begin, begin + size - 1], side="right")
        ends = np.minimum(self._shard_end[low : high + 1], begin + size)
        shift = np.repeat(self._shard_shift[low : high + 1], np.diff(ends, prepend=begin))
        inner = ends[:-1] - begin
        return shift + np.arange(begin, begin + size), inner[inner > 0]

    def _plan_block(self, lanes: Places) -> npt.NDArray[np.uint32]:
        """Fill the lanes' rows of `_places`; returns their runs, [5, num_runs] as in `_runs`."""
        sizes, begins = self._lane_size[lanes], self._lane_begin[lanes]
        width = int(sizes.max())
        if not width:
            return self._runs[:, :0]
        filled = np.arange(width) < sizes[:, None]
        # Each row of these tables is a lane along the line; rows are padded.
        samples = np.zeros((len(lanes), width), dtype=np.int64)
        elsewhere = np.zeros_like(filled)
        for row, (begin, size) in enumerate(zip(begins.tolist(), sizes.tolist(), strict=True)):
            if size:
                samples[row, :size], inner = self._stretches(begin, size)
                elsewhere[row, inner] = True
        num_bytes = np.where(filled, self._length[samples], 0).astype(np.int64)
        piece = (np.cumsum(num_bytes, axis=1) - num_bytes) // self._run_bytes
        # A run ends where it has its bytes, and where the next sample lies in another shard.
        starts = elsewhere.copy()
        starts[:, 0] = filled[:, 0]
        starts[:, 1:] |= (piece[:, 1:] != piece[:, :-1]) & filled[:, 1:]
        run = np.cumsum(starts, axis=1) - 1
        run[~filled] = 0
        rows, columns = np.nonzero(starts)
        run_number = run[rows, columns]
        opened = self._open_in_random_order(begins[rows] + columns, rows, run_number // _WINDOW_RUNS)
        # The run that is opened as number j has its samples at times in [j, j + shuffle_chunks).
        opened_grid = np.zeros((len(lanes), int(run.max()) + 1), dtype=np.uint64)
        opened_grid[rows, run_number] = opened
        place = (begins[:, None] + np.arange(width)).astype(np.uint64)
        time = np.take_along_axis(opened_grid, run, axis=1) << np.uint64(self._time_bits)
        time += np.uint64(self._open_runs) * (_hash(place, self._keys[0]) >> np.uint64(64 - self._time_bits))
        keys = (time << np.uint64(self._index_bits)) | np.arange(width, dtype=np.uint64)
        keys[~filled] = _PADDING
        keys.sort(axis=1)
        index = (keys & np.uint64((1 << self._index_bits) - 1)).astype(np.int64)
        index[~filled] = 0
        self._places[lanes, :width] = begins[:, None] + index
        # The same, run by run: of repeated subscripts the last is what remains.
        last = np.zeros(opened_grid.shape, dtype=np.uint32)
        lane_rows = np.broadcast_to(np.arange(len(lanes))[:, None], index.shape)
        run_at = np.take_along_axis(run, index, axis=1)
        last[lane_rows[filled], run_at[filled]] = np.broadcast_to(np.arange(width), index.shape)[filled]
        begin = begins[rows] + columns
        end = np.append(begin[1:], 0)
        is_final = np.append(rows[1:] != rows[:-1], True)
        end[is_final] = (begins + sizes)[rows[is_final]]
        return np.stack([begin, end, opened, last[rows, run_number], lanes[rows]]).astype(np.uint32)

    def _open_in_random_order(self, begin: Places, rows: Places, window: Places) -> Places:
        """Number the runs of each row from 0 in a random order, window after window; all arrays [num_runs]."""
        draw = _hash(begin.astype(np.uint64), self._keys[1])
        in_order = np.lexsort((draw, window, rows))
        number = np.empty_like(rows)
        number[in_order] = np.arange(len(rows))
        row_start = np.searchsorted(rows, np.arange(rows.max() + 1))
        return number - row_start[rows]


def _hash(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """64 well-mixed bits for each value: SplitMix64's finalizer (Steele, Lea and Flood, 2014)."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15) + key
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
