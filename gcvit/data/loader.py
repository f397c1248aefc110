"""The stream of batches, for training and for evaluation.

1. A run's progress is one integer, the samples consumed: step t begins at t * global_batch_size.
2. The main process plans. Sample number g is position g % N of epoch g // N, and the epoch's order gives the sample.
   The rank's share of each global batch (`gcvit.data.batch_plan`) is cut into micro-batches, and each of these into
   one small task per worker.
3. A chunk of neighbouring samples belongs to one worker, which reads it at once and keeps it until its last sample
   is used. If a rank does not keep its lanes, several ranks need a chunk, and samples are read one by one.
4. A worker seeds each sample by (seed, epoch, position), decodes, transforms and stacks it, and times each stage.
5. The main process receives the pieces in the order of the tasks, pins them if asked to, and groups them by step.
6. A corrupt sample is replaced by another, chosen by (seed, epoch, position), and reported in the batch. Any other
   failure of a worker is sent back as an error, and the main process raises it: a UserError stays one.

The only state is the step: to resume is to start at another step, on any number of processes.
"""

import itertools
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gcvit.config.schema import AugmentConfig, Config, DataConfig
from gcvit.data.batch import Batch, Corruption, EvalBatch, Piece, empty_images, join_pieces
from gcvit.data.batch_plan import BatchPlan, check_world, cut_consecutive
from gcvit.data.decode import DecodeError
from gcvit.data.epoch_iterator import EpochOrders
from gcvit.data.source import CorruptSample, Source
from gcvit.data.transforms import EvalTransform, TrainTransform, draw_erase, preserved_generators, seed_sample
from gcvit.data.worker_process import loader_context, start_worker
from gcvit.errors import UserError

__all__ = ["Batch", "EvalBatch", "eval_stream", "train_stream"]

Loaded = TypeVar("Loaded", Piece, EvalBatch)
Indices = npt.NDArray[np.int64]

_REPLACEMENT_STREAM = 4  # separates these draws from others with the same seed
_MAX_REPLACEMENTS = 100  # attempts: so many corrupt samples in a row are no accident


@dataclass(frozen=True)
class _TrainTask:
    """Some rows of a micro-batch to load; every array is [p].

    `positions` lie within the epochs. `is_last` is true where the worker can drop the chunk after this sample.
    """

    rows: Indices
    epochs: Indices
    positions: Indices
    samples: Indices
    chunk_begin: Indices
    chunk_end: Indices
    is_last: npt.NDArray[np.bool_]


def train_stream(
    source: Source,
    config: Config,
    batch_plan: BatchPlan,
    *,
    start_step: int,
    rank: int,
    pin_memory: bool,
) -> Iterator[tuple[Batch, ...]]:
    """Stream this rank's batches of the optimizer steps from `start_step` on, without end.

    Returns:
        For each step, `batch_plan.num_micro_steps` batches.

    Raises:
        UserError: at once, for more processes than samples, a micro-batch too small for a pair, or an unknown
            RandAugment policy. Later, with `rank_local`, for files that cannot be read, and where all attempts to
            replace a corrupt sample meet another.
    """
    check_world(source.num_samples, batch_plan.world_size)
    data = config.data
    # Plan before the loader starts, so that errors in the numbers are raised before processes exist.
    micro_batches = batch_plan.micro_batches(rank, data.lanes)
    tasks = _plan_training(source, data, config.seed, batch_plan, micro_batches, start_step)
    loader = _TrainDataset(source, data, config.augment, config.model.img_size, config.seed)
    pieces = _load(loader, tasks, data.num_workers, data, pin_memory)
    return _group(pieces, micro_batches, _num_pieces(data))


def eval_stream(
    source: Source,
    data: DataConfig,
    *,
    img_size: int,
    batch_size: int,
    world_size: int,
    rank: int,
    pin_memory: bool = False,
    skip_corrupt: bool = False,
    five_crop: bool = False,
) -> Iterator[EvalBatch]:
    """Stream each sample to exactly one rank, in the same number of batches on every rank.

    A rank reads consecutive samples. A batch has `batch_size` rows; rows of padding are masked.

    Args:
        skip_corrupt: A corrupt sample becomes a row of padding, not an error.
        five_crop: Each sample has five consecutive images (see `EvalTransform`).

    Raises:
        UserError: At once, if there are more ranks than samples. Later, if a file cannot be read, or if a sample is
            corrupt and `skip_corrupt` is False.
    """
    check_world(source.num_samples, world_size)
    low, high = (source.num_samples * end // world_size for end in (rank, rank + 1))
    largest_share = -(-source.num_samples // world_size)
    num_batches = -(-largest_share // batch_size)
    tasks = _plan_evaluation(source, cut_consecutive(np.arange(low, high), num_batches, batch_size))
    loader = _EvalDataset(source, data, img_size, batch_size, skip_corrupt, five_crop)
    return _load(loader, tasks, min(data.num_workers, num_batches), data, pin_memory)


def _plan_training(
    source: Source,
    data: DataConfig,
    seed: int,
    batch_plan: BatchPlan,
    micro_batches: list[Indices],
    start_step: int,
) -> Iterator[_TrainTask]:
    reads_chunks = source.is_chunked and batch_plan.holds_whole_lanes(data.lanes)
    batch_size = batch_plan.global_batch_size
    orders = EpochOrders(source, data, seed, np.concatenate(micro_batches), batch_size, start_step)
    for step in itertools.count(start_step):
        for micro_batch in micro_batches:
            epochs, positions = np.divmod(step * batch_size + micro_batch, source.num_samples)
            yield from _cut_tasks(orders, epochs, positions, reads_chunks, _num_pieces(data))


def _cut_tasks(
    orders: EpochOrders, epochs: Indices, positions: Indices, reads_chunks: bool, num_pieces: int
) -> Iterator[_TrainTask]:
    samples, begin, end, number = (np.empty_like(positions) for _ in range(4))
    is_last = np.ones(len(positions), dtype=bool)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        found = orders.lookup(int(epoch), positions[in_epoch])
        samples[in_epoch], number[in_epoch], is_last[in_epoch] = found.samples, found.chunk_number, found.is_last
        begin[in_epoch], end[in_epoch] = found.chunk_begin, found.chunk_end
    if not reads_chunks:
        begin, end, number, is_last = samples, samples + 1, np.arange(len(samples)), np.ones_like(is_last)
    for piece in range(num_pieces):
        rows = np.flatnonzero(number % num_pieces == piece)
        chunk = begin[rows], end[rows], is_last[rows].astype(np.bool_)
        yield _TrainTask(rows, epochs[rows], positions[rows], samples[rows], *chunk)


def _plan_evaluation(source: Source, tasks: list[Indices]) -> Iterator[Indices]:
    shards = [np.unique(np.searchsorted(source.first, task, side="right") - 1) for task in tasks]
    order = np.unique(np.concatenate(shards)).tolist()
    prefetcher = source.prefetch(order)
    for task, needed in zip(tasks, shards, strict=True):
        if prefetcher and len(needed):
            prefetcher.advance(order.index(needed[-1]) + 1)
        yield task
    if prefetcher:
        prefetcher.close()


def _num_pieces(data: DataConfig) -> int:
    # The loader sends tasks to its workers in turn, so that worker w loads piece w of each micro-batch.
    return max(1, data.num_workers)


class _TrainDataset(Dataset[Piece | UserError]):
    """Load the piece of a batch that a task describes; this runs in the workers."""

    def __init__(self, source: Source, data: DataConfig, augment: AugmentConfig, img_size: int, seed: int):
        self._source, self._seed, self._img_size = source, seed, img_size
        self._transform = TrainTransform(augment, data, img_size)
        self._erase_prob = augment.erase_prob
        self._chunks: dict[tuple[int, int], list[memoryview]] = {}  # in the shuffle buffer, by epoch and first sample

    def __getitem__(self, task: _TrainTask) -> Piece | UserError:
        timer = self._transform.timer
        timer.switch("collation")
        images = empty_images(len(task.rows), self._img_size)
        erase = np.zeros((len(task.rows), 5), dtype=np.int64)
        samples = task.samples.copy()
        corrupt: list[Corruption] = []
        with preserved_generators():
            for i, (epoch, position, sample) in enumerate(
                zip(task.epochs.tolist(), task.positions.tolist(), task.samples.tolist(), strict=True)
            ):
                try:
                    timer.switch("storage")
                    chunk = int(task.chunk_begin[i]), int(task.chunk_end[i])
                    content = self._read(epoch, sample, *chunk, is_last=bool(task.is_last[i]))
                    for attempt in range(_MAX_REPLACEMENTS):
                        seed_sample(self._seed, epoch, position)
                        try:
                            self._source.check(sample, content)
                            view = self._transform(content)
                            timer.switch("collation")
                            images[i] = view
                            break
                        except (CorruptSample, DecodeError) as error:
                            corrupt.append(Corruption(sample, self._source.name(sample), str(error)))
                        timer.switch("storage")
                        sample = self._draw_replacement(epoch, position, attempt)
                        (content,) = self._source.fetch(sample, sample + 1)
                    else:
                        return _too_much_corruption(corrupt)
                except UserError as error:
                    return error
                samples[i] = sample
                erase[i] = draw_erase(self._erase_prob, self._img_size, self._img_size)
        labels = self._source.label[samples].astype(np.int64)
        timer.switch(None)
        return Piece(task.rows, images, labels, erase, tuple(corrupt), samples, timer.pop_seconds())

    def _read(self, epoch: int, sample: int, begin: int, end: int, *, is_last: bool) -> memoryview:
        chunk = self._chunks.pop((epoch, begin), None)
        if chunk is None:
            chunk = self._source.fetch(begin, end)
        if not is_last:
            self._chunks[epoch, begin] = chunk
        return chunk[sample - begin]

    def _draw_replacement(self, epoch: int, position: int, attempt: int) -> int:
        words = np.random.SeedSequence((self._seed, _REPLACEMENT_STREAM, epoch, position, attempt)).generate_state(
            1, np.uint64
        )
        return int(words[0]) % self._source.num_samples


def _too_much_corruption(corrupt: list[Corruption]) -> UserError:
    return UserError(
        f"{len(corrupt)} samples in a row are corrupt",
        got="; ".join(f"{corruption.where} ({corruption.reason})" for corruption in corrupt[-3:]),
        hint="python -m data_prep.verify lists all corruption in shards",
    )


class _EvalDataset(Dataset[EvalBatch | UserError]):
    """Load a batch of evaluation; a task holds the numbers of up to `batch_size` consecutive samples."""

    def __init__(
        self, source: Source, data: DataConfig, img_size: int, batch_size: int, skip_corrupt: bool, five_crop: bool
    ):
        self._source, self._img_size, self._batch_size = source, img_size, batch_size
        self._transform, self._views = EvalTransform(data, img_size, five_crop), 5 if five_crop else 1
        self._skip_corrupt = skip_corrupt

    def __getitem__(self, samples: Indices) -> EvalBatch | UserError:
        images = empty_images(self._batch_size * self._views, self._img_size)
        images[len(samples) * self._views :] = 0
        valid = torch.arange(self._batch_size) < len(samples)
        corrupt: list[Corruption] = []
        try:
            contents = self._source.fetch(int(samples[0]), int(samples[-1]) + 1) if len(samples) else []
            for row, (sample, content) in enumerate(zip(samples.tolist(), contents, strict=True)):
                views = slice(row * self._views, (row + 1) * self._views)
                try:
                    self._source.check(sample, content)
                    images[views] = self._transform(content)
                except (CorruptSample, DecodeError) as error:
                    corrupt.append(Corruption(sample, self._source.name(sample), str(error)))
                    images[views], valid[row] = 0, False
        except UserError as error:
            return error
        if corrupt and not self._skip_corrupt:
            return UserError(
                "a sample is corrupt",
                got=f"{corrupt[0].where} ({corrupt[0].reason})",
                hint=(
                    "python -m data_prep.verify lists all corruption, and --repair replaces it"
                    if self._source.is_chunked
                    else "replace the file"
                )
                + "; --skip-corrupt leaves it out",
            )
        labels, indices = torch.zeros((2, self._batch_size), dtype=torch.int64)
        labels[: len(samples)] = torch.from_numpy(self._source.label[samples].astype(np.int64))
        indices[: len(samples)] = torch.from_numpy(samples)
        return EvalBatch(images, labels, valid, indices, tuple(corrupt))


def _load(
    loader: Dataset[Loaded | UserError],
    tasks: Iterator[Any],
    num_workers: int,
    data: DataConfig,
    pin_memory: bool,
) -> Iterator[Loaded]:
    """Load the tasks in their order; without workers, each is loaded by this process when it is asked for."""
    if num_workers:
        # Images of all micro-batches of a step may be in transit at once, each with a file descriptor.
        _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    loaded = DataLoader(
        loader,
        batch_size=None,
        sampler=tasks,
        num_workers=num_workers,
        prefetch_factor=data.prefetch_batches if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
        multiprocessing_context=loader_context() if num_workers else None,
        # The loader draws the seeds of its workers, which are not used, from here, not from the global generator.
        generator=torch.Generator(),
    )
    return _raise_error(iter(loaded))


def _raise_error(items: Iterator[Loaded | UserError]) -> Iterator[Loaded]:
    """Yield the items; raise the first error that comes in place of one."""
    for item in items:
        if isinstance(item, UserError):
            error = item
            break
        yield item
    else:
        return
    # Nothing may refer to the loader when the error leaves, this frame and the error's traceback included. If it
    # is freed in a cycle, its queues close before the workers are asked to end, and each is awaited for 5 s.
    del items, item
    error.rank_local = True  # type: ignore[attr-defined]  # other ranks do not raise this error
    try:
        raise error
    finally:
        del error


def _group(pieces: Iterator[Piece], micro_batches: list[Indices], num_pieces: int) -> Iterator[tuple[Batch, ...]]:
    positions = [torch.from_numpy(micro_batch) for micro_batch in micro_batches]
    while True:
        yield tuple(_await_batch(where, pieces, num_pieces) for where in positions)


def _await_batch(positions: Tensor, pieces: Iterator[Piece], num_pieces: int) -> Batch:
    """Receive the pieces of a batch, and time the wait for each.

    A wait is attributed to stages in proportion to the worker's seconds on the piece.
    """
    waited: dict[str, float] = defaultdict(float)
    received = []
    for _ in range(num_pieces):
        begin = time.perf_counter()
        piece = next(pieces)
        share = (time.perf_counter() - begin) / (sum(piece.seconds.values()) or 1.0)
        for stage, seconds in piece.seconds.items():
            waited[stage] += share * seconds
        received.append(piece)
    begin = time.perf_counter()
    batch = join_pieces(positions, tuple(received))
    waited["collation"] += time.perf_counter() - begin
    return replace(batch, waited=waited)
