"""The orders of consecutive epochs, planned ahead, and the shards that a rank needs, prefetched in order of use."""

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from gcvit.config.schema import DataConfig
from gcvit.data.epoch_order import EpochOrder, EpochSlice
from gcvit.data.source import Source

Indices = npt.NDArray[np.int64]


class EpochOrders:
    """The orders of the epochs that a rank reads, from `start_step` on.

    A thread plans the next epoch while one is read. If the shards lie elsewhere, those of this rank's lanes are
    prefetched in the order of their use.

    Args:
        share: the rank's positions in each global batch: [share].
        start_step: first optimizer step that is read.
    """

    def __init__(
        self,
        source: Source,
        data: DataConfig,
        seed: int,
        share: Indices,
        global_batch_size: int,
        start_step: int,
    ):
        self._source, self._data, self._seed = source, data, seed
        # A slot of the batch meets only lanes that are congruent to it, less the epoch's first sample, modulo this.
        self._period = math.gcd(global_batch_size, data.lanes)
        self._slots = np.unique(share % self._period)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="order")
        self._orders: dict[int, Future[EpochOrder]] = {}
        self._start_epoch, start = divmod(start_step * global_batch_size, source.num_samples)
        self._start_entry = start // data.lanes
        self._first_use: dict[tuple[int, int], int] = {}  # (epoch, shard) to its rank among the prefetched shards
        self._prefetcher = source.prefetch(self._shards())

    def lookup(self, epoch: int, positions: Indices) -> EpochSlice:
        """Look up the samples at `positions` [b] of an epoch; epochs must come in ascending order."""
        for wanted in (epoch, epoch + 1):
            if wanted not in self._orders:
                self._orders[wanted] = self._thread.submit(self._plan, wanted)
        self._orders.pop(epoch - 1, None)
        found = self._orders[epoch].result().lookup(positions)
        if self._prefetcher:
            shards = np.unique(np.searchsorted(self._source.first, found.samples, side="right") - 1)
            self._prefetcher.advance(max(self._first_use.get((epoch, shard), 0) for shard in shards.tolist()))
        return found

    def _plan(self, epoch: int) -> EpochOrder:
        order = build_order(self._source, self._data, self._seed, epoch)
        order.plan(self._lanes(epoch))
        return order

    def _lanes(self, epoch: int) -> Indices:
        slots = (np.arange(self._data.lanes) + epoch * self._source.num_samples) % self._period
        return np.flatnonzero(np.isin(slots, self._slots))

    def _shards(self) -> Iterator[int]:
        """Yield the shards in the order of their use, epoch after epoch; this runs in the prefetcher's thread."""
        for epoch in itertools.count(self._start_epoch):
            start_entry = self._start_entry if epoch == self._start_epoch else 0
            order = build_order(self._source, self._data, self._seed, epoch)
            for shard in order.shards(self._lanes(epoch), start_entry):
                self._first_use[epoch, shard] = len(self._first_use) + 1
                yield shard


def build_order(source: Source, data: DataConfig, seed: int, epoch: int) -> EpochOrder:
    """Build the order of an epoch, counted from 0, without planning any lane."""
    return EpochOrder(
        source.first,
        source.length,
        seed=seed,
        epoch=epoch,
        lanes=data.lanes,
        chunk_bytes=data.chunk_bytes,
        shuffle_chunks=data.shuffle_chunks,
    )


def find_samples(source: Source, data: DataConfig, seed: int, numbers: Indices) -> Indices:
    """Find the samples that a run read as its `numbers`, each step * global_batch_size + position.

    Their lanes are planned again, which takes seconds for a large set.

    Returns:
        Samples of the source: int64 [n].
    """
    epochs, positions = np.divmod(numbers, source.num_samples)
    samples = np.empty_like(positions)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        samples[in_epoch] = build_order(source, data, seed, int(epoch)).lookup(positions[in_epoch]).samples
    return samples
