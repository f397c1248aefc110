"""The epochs that a rank goes through: their orders, planned ahead, and the shards of each, brought ahead."""

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from gcvit.config.schema import DataConfig
from gcvit.data.epoch_order import EpochOrder, Picks
from gcvit.data.source import Source

Indices = npt.NDArray[np.int64]


class Epochs:
    """What lies at the positions that a rank takes: `share` of each global batch from `start_step` on.

    The next epoch is planned in a thread while one is used. Where shards must be brought from elsewhere, those of
    this rank's lanes are asked for in the order of their use.
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
        # A batch's slot meets only lanes that are congruent to it, less the epoch's first sample, modulo this.
        self._period = math.gcd(global_batch_size, data.lanes)
        self._slots = np.unique(share % self._period)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="order")
        self._orders: dict[int, Future[EpochOrder]] = {}
        self._start_epoch, start = divmod(start_step * global_batch_size, source.num_samples)
        self._start_entry = start // data.lanes
        self._use: dict[tuple[int, int], int] = {}  # epoch and shard to its place among the shards asked for
        self._prefetcher = source.prefetch(self._shards())

    def take(self, epoch: int, positions: Indices) -> Picks:
        """As `EpochOrder.take`; epochs come in ascending order."""
        for wanted in (epoch, epoch + 1):
            if wanted not in self._orders:
                self._orders[wanted] = self._thread.submit(self._plan, wanted)
        self._orders.pop(epoch - 1, None)
        picks = self._orders[epoch].result().take(positions)
        if self._prefetcher:
            shards = np.unique(np.searchsorted(self._source.first, picks.samples, side="right") - 1)
            self._prefetcher.advance(max(self._use.get((epoch, shard), 0) for shard in shards.tolist()))
        return picks

    def _plan(self, epoch: int) -> EpochOrder:
        order = order_of(self._source, self._data, self._seed, epoch)
        order.plan(self._lanes(epoch))
        return order

    def _lanes(self, epoch: int) -> Indices:
        slots = (np.arange(self._data.lanes) + epoch * self._source.num_samples) % self._period
        return np.flatnonzero(np.isin(slots, self._slots))

    def _shards(self) -> Iterator[int]:
        """Shards in the order in which they are needed, epoch after epoch; runs in the prefetcher's thread."""
        for epoch in itertools.count(self._start_epoch):
            start_entry = self._start_entry if epoch == self._start_epoch else 0
            for shard in order_of(self._source, self._data, self._seed, epoch).shards(self._lanes(epoch), start_entry):
                self._use[epoch, shard] = len(self._use) + 1
                yield shard


def order_of(source: Source, data: DataConfig, seed: int, epoch: int) -> EpochOrder:
    """The order in which a run takes the samples of an epoch, which counts from 0; no lane is planned yet."""
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
    """The samples that a run takes as its `numbers` [n]: step * global_batch_size + position, counted from 0.

    Their lanes are planned anew, in seconds for a large set: for the rare look back.
    """
    epochs, places = np.divmod(numbers, source.num_samples)
    samples = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        samples[here] = order_of(source, data, seed, int(epoch)).take(places[here]).samples
    return samples
