"""Time the stages of a step on each rank, and find what bounds the run and which rank the others wait for.

1. The loop switches a timer between stages (`StepTimer`). On a GPU the marks are events in its stream, so that a stage
   has the time in which the GPU worked or was idle; nothing waits for the events before the row is logged.
2. Waiting for data is divided by the loader's own times of the pieces that were waited for.
3. A slow rank makes the others wait in collectives, so their time says nothing about the network: the slowest rank is
   the one that waits least for others (`find_bottleneck`), and its largest stage bounds the run.
4. The ranks meet at a barrier before a row: a rank that was slow after the last collective is waited for there.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from gcvit.data.batch import Batch
from gcvit.data.stage_timer import StageTimer
from gcvit.monitoring.process_group_hooks import Around, wrap_collectives
from gcvit.monitoring.schema import STAGES
from gcvit.parallel.engine import Engine

LOADING = STAGES[:4]
"""Stages of the loader. The device's part of the augmentation counts as compute."""
_DATA, _WAITING = "data", "waiting"
"""Waiting for a batch, and for other ranks; `Seconds.by_stage` divides them among `STAGES`."""

_TIMED_STAGES = ("compute", "checkpoint", _WAITING)  # in which the training's thread calls collectives
_MAX_MARKS = 4096  # events in a GPU's stream, before the passed ones are summed


class StepTimer:
    """Times the stages of one rank's steps. `switch` waits for nothing."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._host = StageTimer()
        self._stage: str | None = None
        self._marks: list[tuple[str | None, torch.cuda.Event]] = []  # the begin of each stage
        self._seconds: dict[str, float] = {}
        self._loading: dict[str, float] = dict.fromkeys(LOADING, 0.0)

    @property
    def stage(self) -> str | None:
        return self._stage

    def switch(self, stage: str | None) -> str | None:
        """Begin a stage; the time of None is not counted. Returns the stage before."""
        before, self._stage = self._stage, stage
        if not self._is_cuda:
            return self._host.switch(stage)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((stage, event))
        if len(self._marks) > _MAX_MARKS and self._marks[_MAX_MARKS // 2][1].query():
            self._add_up(_MAX_MARKS // 2)
        return before

    @contextmanager
    def during(self, stage: str | None) -> Iterator[None]:
        """Switch to a stage while inside, and then back to the one before."""
        before = self.switch(stage)
        try:
            yield
        finally:
            self.switch(before)

    def batches(self, stream: Iterator[tuple[Batch, ...]]) -> Iterator[tuple[Batch, ...]]:
        """Pass on the stream and time the waits for it."""
        while True:
            with self.during(_DATA):
                batches = next(stream, None)
            if batches is None:
                return
            for batch in batches:
                for stage, seconds in batch.waited.items():
                    self._loading[stage] += seconds
            yield batches

    def snapshot(self, barrier: Callable[[], None] = lambda: None) -> "Seconds":
        """Return the sums since the last call. On a GPU it waits for everything that was launched.

        Args:
            barrier: Waits for the other ranks; its time counts as waiting.
        """
        if self._is_cuda:
            torch.cuda.current_stream().synchronize()  # a rank reaches the barrier when its GPU does
        with self.during(_WAITING):
            barrier()
        self.switch(self._stage)
        if self._is_cuda:
            self._marks[-1][1].synchronize()
            self._add_up(len(self._marks) - 1)
        seconds = Seconds(self._seconds if self._is_cuda else self._host.pop_seconds(), self._loading)
        self._seconds, self._loading = {}, dict.fromkeys(LOADING, 0.0)
        return seconds

    def _add_up(self, num_marks: int) -> None:
        for (stage, begin), (_, end) in zip(self._marks[:num_marks], self._marks[1:], strict=False):
            if stage is not None:
                self._seconds[stage] = self._seconds.get(stage, 0.0) + begin.elapsed_time(end) / 1000
        del self._marks[:num_marks]


@dataclass(frozen=True)
class Seconds:
    """Seconds of one rank by the timer's stages, and by the loader's while it was waited for."""

    clock: Mapping[str, float] = field(default_factory=dict)
    loading: Mapping[str, float] = field(default_factory=dict)

    @property
    def waiting(self) -> float:
        """Seconds spent waiting for other ranks."""
        return self.clock.get(_WAITING, 0.0)

    @property
    def data_share(self) -> float:
        """Share of the time that was spent waiting for data, 0..1."""
        return self.clock.get(_DATA, 0.0) / (sum(self.clock.values()) or 1.0)

    def by_stage(self) -> dict[str, float]:
        """Divide all seconds among `STAGES`."""
        stages = {stage: self.clock.get(stage, 0.0) for stage in STAGES}
        stages["communication"] += self.waiting
        loaded = sum(self.loading.values())
        for stage in LOADING:
            # Where the loader timed nothing (this rank got no sample), the storage is assumed.
            share = self.loading.get(stage, 0.0) / loaded if loaded else float(stage == "storage")
            stages[stage] = self.clock.get(_DATA, 0.0) * share
        return stages


@dataclass(frozen=True)
class Bottleneck:
    """What bounds a run, as in a row of metrics."""

    slowest_rank: int
    bound_by: str
    bound_share: float  # of the slowest rank's time, 0..1
    data_wait: float  # share of the slowest rank's time, 0..1
    stages: dict[str, float]  # seconds of the slowest rank, of all steps together


def find_bottleneck(of_ranks: Sequence[Seconds]) -> Bottleneck:
    """Find the rank that all others wait for, and its largest stage."""
    slowest = min(range(len(of_ranks)), key=lambda rank: of_ranks[rank].waiting)
    stages = of_ranks[slowest].by_stage()
    bound_by = max(STAGES, key=lambda stage: stages[stage])
    share = stages[bound_by] / (sum(stages.values()) or 1.0)
    return Bottleneck(slowest, bound_by, share, of_ranks[slowest].data_share, stages)


@contextmanager
def time_waits(timer: StepTimer, engine: Engine) -> Iterator[None]:
    """Have the timer separate communication and waiting from compute and from saving, while the block runs.

    On a CPU a collective is issued and then awaited. On a GPU it is queued in a stream of its own, and all the time in
    which the training's stream is idle is waiting. Call it from the thread that trains: collectives of other
    threads, a checkpoint's for example, are not timed.
    """
    if engine.world.size == 1:
        yield
        return
    is_cuda = engine.world.device.type == "cuda"
    main_stream = torch.cuda.current_stream() if is_cuda else None
    trainer = threading.current_thread()

    def is_training() -> bool:
        here = threading.current_thread()
        is_ours = here is trainer or (is_cuda and isinstance(here, threading._DummyThread))  # a GPU's autograd
        return is_ours and timer.stage in _TIMED_STAGES and (not is_cuda or torch.cuda.current_stream() == main_stream)

    def timed_as(stage: str) -> Around:
        def run(call: Callable[[], Any]) -> Any:
            if timer.stage == stage or not is_training():
                return call()
            with timer.during(stage):
                return call()

        return run

    def begin_waiting(parameter: torch.Tensor) -> None:
        # The first layer's gradient comes last: what follows in the backward pass is the exchange of gradients.
        if timer.stage == "compute":
            timer.switch(_WAITING)

    first_weight = next(engine.module.stem.parameters())
    handle = first_weight.register_post_accumulate_grad_hook(begin_waiting)
    issuing = timed_as(_WAITING if is_cuda else "communication")
    try:
        with wrap_collectives(issuing=issuing, waiting=timed_as(_WAITING), has_streams=is_cuda):
            yield
    finally:
        handle.remove()
