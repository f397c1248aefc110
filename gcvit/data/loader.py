"""The stream of batches, for training and for evaluation.

1. The run's place is one integer, the samples consumed: step t begins at t * global_batch_size.
2. The main process plans: sample number g is position g % N of epoch g // N, and the epoch's order names the
   sample. Of each global batch it takes its rank's share (`gcvit.data.batch_plan`), cuts it into micro-batches,
   and each of these into one task per loader process, of a few numbers.
3. A run of neighbouring samples is one loader process's, which reads it at once and keeps it until its last sample
   is used. (Where a rank does not keep its lanes, runs are several ranks', and samples are read one by one.)
4. A loader process seeds each sample by (seed, epoch, position), decodes, transforms, stacks; it times each of these.
5. The main process receives the pieces in the order of the tasks, pins them where wanted, groups a step's.
6. A corrupt sample is replaced by another, which (seed, epoch, position) chooses; the batch tells. What else fails
   travels as an error; the main process raises it, and it stays a UserError.

Nothing is remembered but the step: resuming is starting at another one, on any number of processes.
"""

import itertools
import multiprocessing
import os
import resource
import signal
import threading
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
from gcvit.data.epoch_iterator import Epochs
from gcvit.data.source import CorruptSample, Source
from gcvit.data.transforms import EvalTransform, TrainTransform, draw_erase, preserved_generators, seed_sample
from gcvit.data.worker_process import loader_context
from gcvit.errors import UserError
from gcvit.runtime import signals

__all__ = ["Batch", "EvalBatch", "eval_stream", "train_stream"]

Loaded = TypeVar("Loaded", Piece, EvalBatch)
Indices = npt.NDArray[np.int64]

_REPLACEMENT_STREAM = 4  # keeps these draws apart from others that begin with the same seed
_MAX_REPLACEMENTS = 100  # tries: so many corrupt samples in a row are no accident


@dataclass(frozen=True)
class _TrainTask:
    """Some rows of a micro-batch to load; every array is [p].

    Row in the micro-batch; epoch and position therein; the sample, its run's begin and end, and whether the run
    is done with it.
    """

    rows: Indices
    epochs: Indices
    places: Indices
    samples: Indices
    begin: Indices
    end: Indices
    last: npt.NDArray[np.bool_]


def train_stream(
    source: Source,
    config: Config,
    batch_plan: BatchPlan,
    *,
    start_step: int,
    rank: int,
    pin_memory: bool,
) -> Iterator[tuple[Batch, ...]]:
    """Endless: for each optimizer step from `start_step` on, this rank's `batch_plan.num_micro_steps` batches.

    Errors: UserError, at once, for more processes than samples, a micro-batch too small for a pair, an unknown
    RandAugment policy; later, with `rank_local`, for files that cannot be read, and for nothing but corruption.
    """
    check_world(source.num_samples, batch_plan.world_size)
    data = config.data
    # Plan before the loader starts, so that errors in the numbers are raised before processes exist.
    micro_batches = batch_plan.micro_batches(rank, data.lanes)
    tasks = _plan_training(source, data, config.seed, batch_plan, micro_batches, start_step)
    loader = _TrainLoader(source, data, config.augment, config.model.img_size, config.seed)
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
    """Each sample once over all ranks, in equally many batches of `batch_size` on each; padding is masked.

    A rank takes consecutive samples. A corrupt one is an error, or with `skip_corrupt` a row of padding. With
    `five_crop` each sample has five images, one behind the other (`EvalTransform`). Errors: as `train_stream`.
    """
    check_world(source.num_samples, world_size)
    low, high = (source.num_samples * end // world_size for end in (rank, rank + 1))
    largest_share = -(-source.num_samples // world_size)
    num_batches = -(-largest_share // batch_size)
    tasks = _plan_evaluation(source, cut_consecutive(np.arange(low, high), num_batches, batch_size))
    loader = _EvalLoader(source, data, img_size, batch_size, skip_corrupt, five_crop)
    return _load(loader, tasks, min(data.num_workers, num_batches), data, pin_memory)


def _plan_training(
    source: Source,
    data: DataConfig,
    seed: int,
    batch_plan: BatchPlan,
    micro_batches: list[Indices],
    start_step: int,
) -> Iterator[_TrainTask]:
    in_runs = source.in_runs and batch_plan.holds_whole_lanes(data.lanes)
    batch_size = batch_plan.global_batch_size
    orders = Epochs(source, data, seed, np.concatenate(micro_batches), batch_size, start_step)
    for step in itertools.count(start_step):
        for positions in micro_batches:
            epochs, places = np.divmod(step * batch_size + positions, source.num_samples)
            yield from _cut_tasks(orders, epochs, places, in_runs, _num_pieces(data))


def _cut_tasks(
    orders: Epochs, epochs: Indices, places: Indices, in_runs: bool, num_pieces: int
) -> Iterator[_TrainTask]:
    samples, begin, end, opened = (np.empty_like(places) for _ in range(4))
    last = np.ones(len(places), dtype=bool)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        picks = orders.take(int(epoch), places[here])
        samples[here], begin[here], end[here] = picks.samples, picks.begin, picks.end
        opened[here], last[here] = picks.opened, picks.last
    if not in_runs:
        begin, end, opened, last = samples, samples + 1, np.arange(len(samples)), np.ones_like(last)
    for piece in range(num_pieces):
        rows = np.flatnonzero(opened % num_pieces == piece)
        yield _TrainTask(
            rows, epochs[rows], places[rows], samples[rows], begin[rows], end[rows], last[rows].astype(np.bool_)
        )


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
    # The loader hands tasks to its processes in turn, so that piece w of each micro-batch is process w's.
    return max(1, data.num_workers)


class _TrainLoader(Dataset[Piece | UserError]):
    """Runs in the loader processes: a task becomes a piece of a batch."""

    def __init__(self, source: Source, data: DataConfig, augment: AugmentConfig, img_size: int, seed: int):
        self._source, self._seed, self._img_size = source, seed, img_size
        self._transform = TrainTransform(augment, data, img_size)
        self._erase_prob = augment.erase_prob
        self._runs: dict[tuple[int, int], list[memoryview]] = {}  # that are open, by epoch and first sample

    def __getitem__(self, task: _TrainTask) -> Piece | UserError:
        stopwatch = self._transform.stopwatch
        stopwatch.switch("collation")
        images = empty_images(len(task.rows), self._img_size)
        erase = np.zeros((len(task.rows), 5), dtype=np.int64)
        samples = task.samples.copy()
        corrupt: list[Corruption] = []
        with preserved_generators():
            for i, (epoch, place, sample) in enumerate(
                zip(task.epochs.tolist(), task.places.tolist(), task.samples.tolist(), strict=True)
            ):
                try:
                    stopwatch.switch("storage")
                    content = self._stored(epoch, sample, int(task.begin[i]), int(task.end[i]), bool(task.last[i]))
                    for attempt in range(_MAX_REPLACEMENTS):
                        seed_sample(self._seed, epoch, place)
                        try:
                            self._source.check(sample, content)
                            view = self._transform(content)
                            stopwatch.switch("collation")
                            images[i] = view
                            break
                        except (CorruptSample, DecodeError) as error:
                            corrupt.append(Corruption(sample, self._source.name(sample), str(error)))
                        stopwatch.switch("storage")
                        sample = self._replacement(epoch, place, attempt)
                        (content,) = self._source.fetch(sample, sample + 1)
                    else:
                        return _too_much_corruption(corrupt)
                except UserError as error:
                    return error
                samples[i] = sample
                erase[i] = draw_erase(self._erase_prob, self._img_size, self._img_size)
        labels = self._source.label[samples].astype(np.int64)
        stopwatch.switch(None)
        return Piece(task.rows, images, labels, erase, tuple(corrupt), samples, stopwatch.take())

    def _stored(self, epoch: int, sample: int, begin: int, end: int, is_last: bool) -> memoryview:
        run = self._runs.pop((epoch, begin), None)
        if run is None:
            run = self._source.fetch(begin, end)
        if not is_last:
            self._runs[epoch, begin] = run
        return run[sample - begin]

    def _replacement(self, epoch: int, place: int, attempt: int) -> int:
        words = np.random.SeedSequence((self._seed, _REPLACEMENT_STREAM, epoch, place, attempt)).generate_state(
            1, np.uint64
        )
        return int(words[0]) % self._source.num_samples


def _too_much_corruption(corrupt: list[Corruption]) -> UserError:
    return UserError(
        f"{len(corrupt)} samples in a row are corrupt",
        got="; ".join(f"{corruption.where} ({corruption.reason})" for corruption in corrupt[-3:]),
        hint="python -m data_prep.verify lists all corruption in shards",
    )


class _EvalLoader(Dataset[EvalBatch | UserError]):
    """As `_TrainLoader`; a task holds the numbers of up to `batch_size` consecutive samples."""

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
                    "python -m data_prep.verify lists all corruption, and --repair mends"
                    if self._source.in_runs
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
    """What becomes of the tasks, in their order; with 0 workers it is made when asked for, in this process."""
    if num_workers:
        # Images of all micro-batches of a step may be on their way at once, each with a file descriptor.
        _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    loaded = DataLoader(
        loader,
        batch_size=None,
        sampler=tasks,
        num_workers=num_workers,
        prefetch_factor=data.prefetch_batches if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=loader_context() if num_workers else None,
        # The loader draws its workers' seeds, which nobody reads, from here, not from the global generator.
        generator=torch.Generator(),
    )
    return _raise_error(iter(loaded))


def _start_worker(worker: int) -> None:
    # Ctrl-C reaches the whole process group: the main process ends its workers, they need not each say so.
    # torch has set one thread a worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # So does the notice to leave, of which they take none (signals.py): they load what the last steps need.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def follow() -> None:
        # torch's own watch looks at the fork server, which lives for as long as one of its children does.
        trainer.join()
        os._exit(1)

    def obey() -> None:
        # A worker that does not stop of itself is ended by the trainer, with SIGTERM.
        while True:
            sent = signal.sigwaitinfo(signals.SIGNALS)
            if (sent.si_signo, sent.si_pid) == (signal.SIGTERM, trainer.pid):
                os._exit(1)

    for watch in (follow, obey):
        threading.Thread(target=watch, daemon=True).start()


def _raise_error(items: Iterator[Loaded | UserError]) -> Iterator[Loaded]:
    """Pass items on; raise the first error that comes in place of one."""
    for item in items:
        if isinstance(item, UserError):
            error = item
            break
        yield item
    else:
        return
    # Nothing may hold the loader when the error leaves, this frame and the error's traceback included: where
    # it dies in a cycle, its queues close before the workers are told to end, and each is awaited for 5 s.
    del items, item
    error.rank_local = True  # type: ignore[attr-defined]  # other ranks do not meet this error
    try:
        raise error
    finally:
        del error


def _group(pieces: Iterator[Piece], micro_batches: list[Indices], num_pieces: int) -> Iterator[tuple[Batch, ...]]:
    positions = [torch.from_numpy(micro_batch) for micro_batch in micro_batches]
    while True:
        yield tuple(_await_batch(where, pieces, num_pieces) for where in positions)


def _await_batch(positions: Tensor, pieces: Iterator[Piece], num_pieces: int) -> Batch:
    """Take a batch's pieces, timing how long each is waited for: in that time the loader works on it, or has done so.

    A wait is split by stage as the loader's work on the piece was.
    """
    waited: dict[str, float] = defaultdict(float)
    taken = []
    for _ in range(num_pieces):
        begin = time.perf_counter()
        piece = next(pieces)
        share = (time.perf_counter() - begin) / (sum(piece.seconds.values()) or 1.0)
        for stage, seconds in piece.seconds.items():
            waited[stage] += share * seconds
        taken.append(piece)
    begin = time.perf_counter()
    batch = join_pieces(positions, tuple(taken))
    waited["collation"] += time.perf_counter() - begin
    return replace(batch, waited=waited)
