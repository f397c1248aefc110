"""The stream of batches, for training and for evaluation.

1. The run's place is one integer, the samples consumed: step t begins at t * global_batch_size.
2. The main process plans: sample number g is position g % N of epoch g // N, and the epoch's order names the
   sample. Of each global batch it takes its rank's share (`gcvit.data.assignment`), cuts it into
   micro-batches, and sends each as a task of a few numbers.
3. A loader process reads the samples, seeds each by (seed, epoch, position), decodes, transforms, stacks.
4. The main process receives the batches in the order of the tasks, pins them where wanted, groups a step's.
5. A sample that cannot be read travels as an error; the main process raises it, and it stays a UserError.

Nothing is remembered but the step: resuming is starting at another one, on any number of processes.
"""

import itertools
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from gcvit.config import Config, DataConfig
from gcvit.data.assignment import (
    cut_micro_batches,
    deal_share,
    micro_batch_capacity,
    num_micro_steps,
    order_epoch,
)
from gcvit.data.batch import Batch, EvalBatch, empty_images
from gcvit.data.source import Source
from gcvit.data.transforms import (
    EvalTransform,
    TrainTransform,
    decode,
    draw_erase,
    preserved_generators,
    seed_sample,
)
from gcvit.errors import UserError

__all__ = ["Batch", "EvalBatch", "eval_stream", "num_micro_steps", "train_stream"]

AnyBatch = TypeVar("AnyBatch", Batch, EvalBatch)
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _TrainTask:
    """A micro-batch to load; all [b]: positions in the global batch, epochs, positions therein, samples."""

    positions: Indices
    epochs: Indices
    places: Indices
    samples: Indices


def train_stream(
    source: Source,
    config: Config,
    *,
    start_step: int,
    world_size: int,
    rank: int,
    micro_batch_size: int | None,
    pin_memory: bool,
) -> Iterator[tuple[Batch, ...]]:
    """Endless: for each optimizer step from `start_step` on, this rank's `num_micro_steps` batches.

    Errors: UserError, at once, for more processes than samples, a micro-batch too small for a pair, an
    unknown RandAugment policy; later, with `rank_local`, for a sample that cannot be read or decoded.
    """
    check_world(source, world_size)
    # Plan before the loader starts, so that mistakes in the numbers are told before processes exist.
    paired = config.augment.mix is not None
    num_steps = num_micro_steps(config.global_batch_size, world_size, micro_batch_size, paired)
    tasks = _plan_training(source, config, start_step, world_size, rank, micro_batch_size)
    batches = _load(_TrainLoader(source, config), tasks, config.data.num_workers, config.data, pin_memory)
    return _group(batches, num_steps)


def eval_stream(
    source: Source,
    data: DataConfig,
    *,
    img_size: int,
    batch_size: int,
    world_size: int,
    rank: int,
    pin_memory: bool = False,
) -> Iterator[EvalBatch]:
    """Each sample once over all ranks, in equally many batches of `batch_size` on each; padding is masked.

    A rank takes consecutive samples. Errors: as `train_stream`.
    """
    check_world(source, world_size)
    low, high = (source.num_samples * end // world_size for end in (rank, rank + 1))
    largest_share = -(-source.num_samples // world_size)
    num_batches = -(-largest_share // batch_size)
    tasks = cut_micro_batches(np.arange(low, high), num_batches, batch_size)
    loader = _EvalLoader(source, data, img_size, batch_size)
    return _load(loader, iter(tasks), min(data.num_workers, num_batches), data, pin_memory)


def check_world(source: Source, world_size: int) -> None:
    if world_size > source.num_samples:
        raise UserError(
            "more processes than samples",
            got=f"{world_size} for {source.num_samples}",
            cure="start fewer processes",
        )


def _plan_training(
    source: Source, config: Config, start_step: int, world_size: int, rank: int, micro_batch_size: int | None
) -> Iterator[_TrainTask]:
    data, batch_size, paired = config.data, config.global_batch_size, config.augment.mix is not None
    share = deal_share(batch_size, world_size, rank, lanes=data.lanes, paired=paired)
    num_steps = num_micro_steps(batch_size, world_size, micro_batch_size, paired)
    capacity = micro_batch_capacity(batch_size, world_size, micro_batch_size, paired=paired)

    @lru_cache(maxsize=2)  # a batch may straddle two epochs
    def order(epoch: int) -> npt.NDArray[np.uint32]:
        return order_epoch(
            source.first,
            source.length,
            seed=config.seed,
            epoch=epoch,
            lanes=data.lanes,
            run_bytes=data.run_bytes,
            open_runs=data.open_runs,
        )

    for step in itertools.count(start_step):
        for positions in cut_micro_batches(share, num_steps, capacity):
            epochs, places = np.divmod(step * batch_size + positions, source.num_samples)
            samples = np.empty_like(places)
            for epoch in np.unique(epochs):
                here = epochs == epoch
                samples[here] = order(int(epoch))[places[here]]
            yield _TrainTask(positions, epochs, places, samples)


class _TrainLoader(Dataset[Batch | UserError]):
    """Runs in the loader processes: a task becomes a batch, or the error that its first bad sample makes."""

    def __init__(self, source: Source, config: Config):
        self._source, self._seed, self._img_size = source, config.seed, config.model.img_size
        self._transform = TrainTransform(config.augment, config.data.mean, config.model.img_size)
        self._erase_prob = config.augment.erase_prob

    def __getitem__(self, task: _TrainTask) -> Batch | UserError:
        images = empty_images(len(task.samples), self._img_size)
        erase = torch.zeros((len(task.samples), 5), dtype=torch.int64)
        with preserved_generators():
            for row, sample in enumerate(task.samples.tolist()):
                try:
                    image = _read_image(self._source, sample)
                except UserError as error:
                    return error
                seed_sample(self._seed, int(task.epochs[row]), int(task.places[row]))
                images[row] = self._transform(image)
                erase[row] = torch.tensor(draw_erase(self._erase_prob, self._img_size, self._img_size))
        labels = torch.from_numpy(self._source.label[task.samples].astype(np.int64))
        return Batch(images, labels, torch.from_numpy(task.positions), erase)


class _EvalLoader(Dataset[EvalBatch | UserError]):
    """As `_TrainLoader`; a task holds the numbers of up to `batch_size` samples."""

    def __init__(self, source: Source, data: DataConfig, img_size: int, batch_size: int):
        self._source, self._img_size, self._batch_size = source, img_size, batch_size
        self._transform = EvalTransform(data, img_size)

    def __getitem__(self, samples: Indices) -> EvalBatch | UserError:
        num_valid = len(samples)
        images = empty_images(self._batch_size, self._img_size)
        images[num_valid:] = 0
        for row, sample in enumerate(samples.tolist()):
            try:
                images[row] = self._transform(_read_image(self._source, sample))
            except UserError as error:
                return error
        labels, indices = torch.zeros((2, self._batch_size), dtype=torch.int64)
        labels[:num_valid] = torch.from_numpy(self._source.label[samples].astype(np.int64))
        indices[:num_valid] = torch.from_numpy(samples)
        return EvalBatch(images, labels, torch.arange(self._batch_size) < num_valid, indices)


def _read_image(source: Source, sample: int) -> Image.Image:
    content = source.read(sample)
    try:
        return decode(content)
    except Exception as error:  # Pillow raises almost anything for damaged bytes, and only Pillow runs in there
        reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UserError(
            "a sample is no image that can be decoded",
            got=f"{source.name(sample)} ({reason})",
            cure="python -m data_prep.verify lists all damage in shards",
        ) from None


def _load(
    loader: Dataset[AnyBatch | UserError],
    tasks: Iterator[Any],
    num_workers: int,
    data: DataConfig,
    pin_memory: bool,
) -> Iterator[AnyBatch]:
    """Batches in the order of the tasks; with 0 workers they are made when asked for, in this process."""
    # Fork would copy a process that runs threads of gloo, DeepSpeed and CUDA. A fork server is a fresh one,
    # which imports this module once, however many loader processes are then forked from it.
    context = None
    if num_workers:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["gcvit.data.stream"])
    batches = DataLoader(
        loader,
        batch_size=None,
        sampler=tasks,
        num_workers=num_workers,
        prefetch_factor=data.prefetch_batches if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=context,
        # The loader draws its workers' seeds, which nobody reads, from here, not from the global generator.
        generator=torch.Generator(),
    )
    return _raise_error(iter(batches))


def _start_worker(worker: int) -> None:
    # Ctrl-C reaches the whole process group: the main process ends its workers, they need not each say so.
    # torch has set one thread a worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _raise_error(batches: Iterator[AnyBatch | UserError]) -> Iterator[AnyBatch]:
    """Pass batches on; raise the first error that comes in place of one."""
    for batch in batches:
        if isinstance(batch, UserError):
            error = batch
            break
        yield batch
    else:
        return
    # Nothing may hold the loader when the error leaves, this frame and the error's traceback included: where
    # it dies in a cycle, its queues close before the workers are told to end, and each is awaited for 5 s.
    del batches, batch
    error.rank_local = True  # type: ignore[attr-defined]  # other ranks do not meet this error
    try:
        raise error
    finally:
        del error


def _group(batches: Iterator[Batch], size: int) -> Iterator[tuple[Batch, ...]]:
    while True:
        yield tuple(next(batches) for _ in range(size))
