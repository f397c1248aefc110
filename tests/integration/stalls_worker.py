"""Trains with sleeps by plan: `stalls_worker.py SPEC.json`. Step by step another stage of another rank is slow.

SPEC: {"config": FILE, "data": DIR, "out": DIR, "runs": [RUN]}, where a RUN is {"tag", "overrides", "plan":
{STEP: [[stage, rank], ...]}}, and "seconds" {stage: seconds of a sleep} where they are not the usual ones. A STEP
counts as finished ones do, from 1. A run's metrics stand in OUT/TAG. The sleep is in the code that the stage is of, in
loader processes too.
"""

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from gcvit.checkpoint.manager import CheckpointManager, Snapshot
from gcvit.config.load import load_config
from gcvit.data import batch, decode, loader, source, transforms
from gcvit.data import folder_source as class_folders
from gcvit.data.source import open_sources
from gcvit.monitoring.schema import STAGES
from gcvit.parallel.ddp import DdpEngine
from gcvit.runtime.distributed import World, join_world
from gcvit.training.setup import build_trainer
from gcvit.training.trainer import Trainer

SECONDS = dict.fromkeys(STAGES, 0.6)
LOADER_PLACES: dict[str, list[tuple[Any, str]]] = {
    "storage": [(source.ShardSource, "fetch"), (class_folders.FolderSource, "fetch")],
    "decoding": [(decode.EncodedImage, "read")],
    "augmentation": [(transforms, "_resize")],
    "collation": [(loader, "empty_images")],
}
COLLECTIVES = (
    *("allreduce", "reduce", "broadcast", "allgather", "all_gather_single", "_allgather_base"),
    *("reduce_scatter_single", "_reduce_scatter_base", "allgather_into_tensor_coalesced"),
)


class Sleeper:
    """Sleeps once at each planned step in each planned stage, on the rank of the plan.

    It sleeps for longer where steps are slow without it: on a busy machine what it slows is to stand out as well.
    """

    def __init__(self, run: dict, rank: int):
        self._plan = {(int(step), stage) for step, slow in run["plan"].items() for stage, at in slow if at == rank}
        self._seconds = SECONDS | run.get("seconds", {})
        self.idle_steps: list[float] = []  # seconds of steps in which nobody slept

    def visit(self, stage: str, step: int) -> None:
        """Called wherever the stage begins."""
        if (step, stage) in self._plan:
            self._plan.remove((step, stage))
            time.sleep(max(self._seconds[stage], 4 * statistics.median(self.idle_steps or [0.0])))


def visiting(visit: Callable[[], None], right: Any) -> Any:
    def slow(*arguments: Any, **options: Any) -> Any:
        visit()
        return right(*arguments, **options)

    return slow


@contextmanager
def visited(places: list[tuple[Any, str]], visit: Callable[[], None]) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name in places:
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, visiting(visit, getattr(owner, name))))
        yield


class SleepyLoader(loader._TrainDataset):
    """Travels to the loader processes, and is slow there."""

    sleeper: ClassVar[Sleeper]
    batch_size: ClassVar[int]

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._sleeper, self._batch_size = self.sleeper, self.batch_size

    def __getitem__(self, task: loader._TrainTask) -> Any:
        if not len(task.rows):
            return super().__getitem__(task)
        step = 1 + int(task.epochs[0] * self._source.num_samples + task.positions[0]) // self._batch_size
        with ExitStack() as stack:
            for stage, places in LOADER_PLACES.items():
                stack.enter_context(visited(places, lambda stage=stage: self._sleeper.visit(stage, step)))
            return super().__getitem__(task)


def train_slowly(trainer: Trainer, sleeper: Sleeper, planned: set[int]) -> None:
    """`planned` are the steps at which any rank sleeps. Checkpoints are written in others, which wait for them.

    On a machine with few cores a write disturbs the training, and more than a sleep would.
    """

    def visit(stage: str) -> None:
        if threading.current_thread() is threading.main_thread() and trainer.timer.stage is not None:
            sleeper.visit(stage, trainer.state.step + 1)

    def hold_write() -> None:
        while trainer.state.step + 1 in planned:
            time.sleep(0.01)

    last_step, last_time = 0, 0.0

    def end_step() -> None:
        nonlocal last_step, last_time
        step, now = trainer.state.step + 1, time.perf_counter()
        if step not in planned and last_step > 1 and last_step not in planned:
            sleeper.idle_steps.append(now - last_time)
        last_step, last_time = step, now
        if step not in planned and trainer.checkpoints._thread:
            trainer.checkpoints._thread.join()

    if isinstance(trainer.engine, DdpEngine):
        # Its own exchange is begun in C++, where nobody can sleep; this one is the same from Python.
        trainer.engine._ddp.register_comm_hook(None, allreduce_hook)
    engine = trainer.engine
    compute = [(engine.module.head, "forward"), (engine, "step"), (engine, "backward")]
    places: dict[str, list[tuple[Any, str]]] = {
        "copy": [(batch.Batch, "images_on")],
        "compute": [compute[trainer.world.rank % 3]],
        "communication": [(dist.ProcessGroup, name) for name in COLLECTIVES],
        # Before the ranks compare their replicas, and after.
        "checkpoint": [((CheckpointManager, "save"), (Snapshot, "copy"))[trainer.world.rank % 2]],
    }
    with ExitStack() as stack:
        for stage, found in places.items():
            stack.enter_context(visited(found, lambda stage=stage: visit(stage)))
        stack.enter_context(visited([(engine, "backward")], end_step))
        stack.enter_context(visited([(CheckpointManager, "_run")], hold_write))
        trainer.train()


def run_all(spec: dict, world: World) -> None:
    for run in spec["runs"]:
        overrides = [*run["overrides"], f"tag={run['tag']}", f"output_dir={spec['out']}", f"data.dir={spec['data']}"]
        config, _ = load_config(spec["config"], overrides)
        SleepyLoader.sleeper = sleeper = Sleeper(run, world.rank)
        SleepyLoader.batch_size = config.global_batch_size
        with (
            mock.patch.object(loader, "_TrainDataset", SleepyLoader),
            build_trainer(config, world, open_sources(config.data, config.model.num_classes)) as trainer,
        ):
            train_slowly(trainer, sleeper, set(map(int, run["plan"])))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    with join_world() as world:
        run_all(spec, world)
