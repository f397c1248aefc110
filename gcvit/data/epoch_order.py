"""The order in which an epoch reads its samples: a pure function of numbers.

An epoch's order is a bijection from positions [0, N) to samples. It does not depend on batches, ranks or workers:

    shard sequence   S2 . . . . . . . | S0 . . . . . | S1 . . . . . . .   the shards, shuffled and concatenated
    lanes            lane 1 | lane 3 | lane 0 | lane 2                    the sequence is cut; lanes lie on it shuffled
    one lane         chunk chunk chunk | chunk chunk                      consecutive samples, `chunk_bytes` each
    shuffle buffer   the order of 256 chunks is shuffled at a time; samples are drawn from `shuffle_chunks` open chunks
    position         p is entry p // L of lane p mod L, so that lane j has ceil((N - j) / L) entries

A rank that always reads the same lanes therefore reads chunks of a few megabytes, each once, from a few shards at a
time. The randomness within a lane comes from hashes of sequence positions, not from the stream of a generator: each
lane can be planned without the others, so that a rank plans only its own.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_BLOCK_SAMPLES = 1 << 18  # lanes are planned in blocks of about so many samples, to bound memory and fit caches
_WINDOW_CHUNKS = 256  # of a lane, whose order is shuffled together: more mix better, fewer need less cache
_ORDER_STREAM = 1  # separates the draws of the order from others with the same seed
_PADDING = np.uint64(2**64 - 1)  # sorts last

Places = npt.NDArray[np.int64]  # positions in the shard sequence, or of samples


@dataclass(frozen=True)
class EpochSlice:
    """The samples at some positions of an epoch, and the chunks that hold them.

    Every array is int64 [b], `is_last` bool [b]. Samples `chunk_begin[i]` to `chunk_end[i]` (exclusive) form the chunk
    of `samples[i]` and are stored in one shard. `chunk_number[i]` numbers the chunks of a lane in the order in which
    they are opened, offset by the lane. `is_last[i]` is true where no later position of this epoch needs the chunk.
    """

    samples: Places
    chunk_begin: Places
    chunk_end: Places
    chunk_number: Places
    is_last: npt.NDArray[np.bool_]


class EpochOrder:
    """The order of one epoch. A lane is planned when it is first looked up.

    Equal arguments give equal orders on every machine, however many lanes are planned together: all keys are distinct
    integers. The planned lanes take 4 bytes per sample, and some for each chunk.

    Args:
        first: first sample of each shard, then N: [num_shards + 1].
        length: size of each sample in bytes: [N].
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
        self._length, self._chunk_bytes, self._shuffle_chunks = length, chunk_bytes, shuffle_chunks
        self._keys = rng.integers(2**64, size=2, dtype=np.uint64)
        self._shards = rng.permutation(len(first) - 1)
        sizes = np.diff(first)[self._shards]
        self._shard_end = np.cumsum(sizes)
        self._shard_shift = first[self._shards] - (self._shard_end - sizes)  # from a sequence position to a sample
        # Neighbours in the sequence are alike if a source is sorted. Shuffled lanes do not make them mixup partners.
        lane_at = rng.permutation(lanes)
        self._lane_size = (self.num_samples - np.arange(lanes) + lanes - 1) // lanes  # some are 0 if N < lanes
        self._lane_begin = np.empty(lanes, dtype=np.int64)
        self._lane_begin[lane_at] = np.cumsum(self._lane_size[lane_at]) - self._lane_size[lane_at]
        width = -(-self.num_samples // lanes)
        self._index_bits = max(1, width.bit_length())
        self._time_bits = min(16, 62 - 2 * self._index_bits)  # of a sample's time within the chunk that opens then
        assert self._time_bits > 0, "2**31 samples in a lane"
        # Rows of lanes that are never planned are never touched, and so occupy no memory.
        self._places = np.empty((lanes, width), dtype=np.uint32)
        self._planned = np.zeros(lanes, dtype=bool)
        # Rows: begin, end, number, last entry, lane. Columns: chunks, sorted by begin.
        self._chunks = np.empty((5, 0), dtype=np.uint32)

    def plan(self, lanes: Places) -> None:
        """Compute the order of those of these lanes that are not planned yet."""
        lanes = np.unique(lanes)
        lanes = lanes[~self._planned[lanes]]
        if not len(lanes):
            return
        chunks = [self._chunks]
        block = max(1, _BLOCK_SAMPLES // max(1, self._places.shape[1]))
        chunks += [self._plan_block(lanes[low : low + block]) for low in range(0, len(lanes), block)]
        self._chunks = np.concatenate(chunks, axis=1)
        self._chunks = self._chunks[:, np.argsort(self._chunks[0], kind="stable")]
        self._planned[lanes] = True

    def lookup(self, positions: Places) -> EpochSlice:
        """Look up the samples at `positions` [b] in [0, N)."""
        entries, lanes = np.divmod(positions, self.lanes)
        self.plan(lanes)
        places = self._places[lanes, entries].astype(np.int64)
        chunk = np.searchsorted(self._chunks[0], places, side="right") - 1
        begin, end, number, last, _ = self._chunks[:, chunk].astype(np.int64)
        shift = self._shift(places)
        return EpochSlice(places + shift, begin + shift, end + shift, number + lanes, entries == last)

    def shards(self, lanes: Places, start_entry: int = 0) -> list[int]:
        """List the shards that these lanes need from `start_entry` on, and perhaps more.

        Returns:
            Shards, nearly in the order of their first use.
        """
        starts = np.append(0, self._shard_end)
        # The rest of a window of chunks may lie anywhere in it.
        if start_entry:
            mean_length = max(1.0, float(np.mean(self._length)))
            start_entry = max(0, start_entry - 2 * _WINDOW_CHUNKS * math.ceil(self._chunk_bytes / mean_length))
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

    def _sequence(self, begin: int, size: int) -> tuple[Places, Places]:
        """Read the shard sequence from `begin` on.

        Returns:
            The samples [size], and those indices, relative to `begin`, at which another shard begins.
        """
        low, high = np.searchsorted(self._shard_end, [begin, begin + size - 1], side="right")
        ends = np.minimum(self._shard_end[low : high + 1], begin + size)
        shift = np.repeat(self._shard_shift[low : high + 1], np.diff(ends, prepend=begin))
        inner = ends[:-1] - begin
        return shift + np.arange(begin, begin + size), inner[inner > 0]

    def _plan_block(self, lanes: Places) -> npt.NDArray[np.uint32]:
        """Fill the lanes' rows of `_places`.

        Returns:
            The chunks of these lanes, uint32 [5, num_chunks] as in `_chunks`.
        """
        sizes, begins = self._lane_size[lanes], self._lane_begin[lanes]
        width = int(sizes.max())
        if not width:
            return self._chunks[:, :0]
        filled = np.arange(width) < sizes[:, None]
        # Each row of these tables is a lane, in the order of the shard sequence. Rows are padded.
        samples = np.zeros((len(lanes), width), dtype=np.int64)
        new_shard = np.zeros_like(filled)
        for row, (begin, size) in enumerate(zip(begins.tolist(), sizes.tolist(), strict=True)):
            if size:
                samples[row, :size], inner = self._sequence(begin, size)
                new_shard[row, inner] = True
        num_bytes = np.where(filled, self._length[samples], 0).astype(np.int64)
        piece = (np.cumsum(num_bytes, axis=1) - num_bytes) // self._chunk_bytes
        # A chunk ends where it has its bytes, and where the next sample is stored in another shard.
        starts = new_shard.copy()
        starts[:, 0] = filled[:, 0]
        starts[:, 1:] |= (piece[:, 1:] != piece[:, :-1]) & filled[:, 1:]
        chunk = np.cumsum(starts, axis=1) - 1
        chunk[~filled] = 0
        rows, columns = np.nonzero(starts)
        chunk_index = chunk[rows, columns]
        number = self._shuffle_windows(begins[rows] + columns, rows, chunk_index // _WINDOW_CHUNKS)
        # The chunk that is opened as number j has its samples at times in [j, j + shuffle_chunks).
        number_grid = np.zeros((len(lanes), int(chunk.max()) + 1), dtype=np.uint64)
        number_grid[rows, chunk_index] = number
        place = (begins[:, None] + np.arange(width)).astype(np.uint64)
        time = np.take_along_axis(number_grid, chunk, axis=1) << np.uint64(self._time_bits)
        time += np.uint64(self._shuffle_chunks) * (_hash(place, self._keys[0]) >> np.uint64(64 - self._time_bits))
        keys = (time << np.uint64(self._index_bits)) | np.arange(width, dtype=np.uint64)
        keys[~filled] = _PADDING
        keys.sort(axis=1)
        index = (keys & np.uint64((1 << self._index_bits) - 1)).astype(np.int64)
        index[~filled] = 0
        self._places[lanes, :width] = begins[:, None] + index
        # The last entry of each chunk: of repeated subscripts, NumPy keeps the last assignment.
        last = np.zeros(number_grid.shape, dtype=np.uint32)
        lane_rows = np.broadcast_to(np.arange(len(lanes))[:, None], index.shape)
        chunk_at = np.take_along_axis(chunk, index, axis=1)
        last[lane_rows[filled], chunk_at[filled]] = np.broadcast_to(np.arange(width), index.shape)[filled]
        begin = begins[rows] + columns
        end = np.append(begin[1:], 0)
        is_final = np.append(rows[1:] != rows[:-1], True)
        end[is_final] = (begins + sizes)[rows[is_final]]
        return np.stack([begin, end, number, last[rows, chunk_index], lanes[rows]]).astype(np.uint32)

    def _shuffle_windows(self, begin: Places, rows: Places, window: Places) -> Places:
        """Number the chunks of each row from 0 in a random order, window after window; all arrays [num_chunks]."""
        draw = _hash(begin.astype(np.uint64), self._keys[1])
        in_order = np.lexsort((draw, window, rows))
        number = np.empty_like(rows)
        number[in_order] = np.arange(len(rows))
        row_start = np.searchsorted(rows, np.arange(rows.max() + 1))
        return number - row_start[rows]


def _hash(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """Hash each value to 64 bits by SplitMix64's finalizer (Steele, Lea and Flood, 2014)."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15) + key
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
