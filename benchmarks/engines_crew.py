"""Run engines side by side: each has its own processes, which train on request and sleep otherwise.

Used by `benchmarks.engines`.
"""

import multiprocessing as mp
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from gcvit.config.schema import (
    Config,
    FsdpConfig,
    ModelConfig,
    OptimConfig,
    OverridesConfig,
    ScheduleConfig,
    ZeroConfig,
)
from gcvit.optim.adamw import MODEL
from gcvit.optim.loss import soft_target_loss
from gcvit.parallel.build import build_engine
from gcvit.runtime.distributed import World, join_world
from gcvit.training.ema import Ema
from gcvit.training.trainer import seed_drop_path

IMAGES_PER_RANK = 8
SHARDS_OF_HSDP = 2
NUM_CLASSES = 1000


def engine_names(world_size: int) -> list[str]:
    """List the engines for so many processes; the others are compared with the first."""
    return ["ddp", "fsdp", *(["hsdp"] if world_size == 2 * SHARDS_OF_HSDP else []), "zero1", "zero2", "zero3"]


def make_config(name: str, world_size: int, quick: bool) -> Config:
    """Make the config of gc_vit_xxtiny at 224, 8 images a rank, fp32; if `quick`, of a tiny model at 32."""
    tiny = OverridesConfig(width=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), windows=(4, 2, 2, 1))
    return Config(
        tag=name,
        global_batch_size=IMAGES_PER_RANK * world_size,
        engine="zero" if name.startswith("zero") else "fsdp" if name == "hsdp" else name,
        fsdp=FsdpConfig(shard_size=SHARDS_OF_HSDP) if name == "hsdp" else None,
        zero=ZeroConfig(stage=int(name[-1])) if name.startswith("zero") else None,
        precision="fp32",
        model=ModelConfig(
            name="gc_vit_xxtiny",
            num_classes=NUM_CLASSES,
            img_size=32 if quick else 224,
            overrides=tiny if quick else None,
        ),
        optim=OptimConfig(lr=1e-5),
        schedule=ScheduleConfig(cosine="100 steps"),
    )


class Training:
    """Call an engine and its EMA as the trainer does, without a loader: the batch is the same at every step."""

    def __init__(self, config: Config, world: World, num_micro_steps: int = 1):
        self.config, self.world = config, world
        self.engine = build_engine(config, world, num_micro_steps=num_micro_steps)
        weights = self.engine.fragments()[MODEL]
        self.ema = Ema(weights, half_life_samples=1e5, global_batch_size=config.global_batch_size)
        generator = torch.Generator().manual_seed(world.rank)
        side = config.model.img_size
        images = torch.randn(IMAGES_PER_RANK, 3, side, side, generator=generator)
        targets = torch.rand(IMAGES_PER_RANK, NUM_CLASSES, generator=generator).softmax(1)
        self.images, self.targets = images.to(world.device), targets.to(world.device)
        self._num_micro_steps, self._num_steps = num_micro_steps, 0

    def backward(self) -> None:
        """Do the part of a step before the update."""
        self.engine.module.train()
        parts = zip(self.images.chunk(self._num_micro_steps), self.targets.chunk(self._num_micro_steps), strict=True)
        for micro_step, (images, targets) in enumerate(parts):
            seed_drop_path(self.config.seed, self._num_steps, micro_step, self.world.rank)
            self.engine.backward(soft_target_loss(self.engine(images), targets).sum())

    def update(self) -> None:
        self.engine.step(self.config.optim.lr)
        self.ema.update()
        self._num_steps += 1

    def step(self) -> None:
        self.backward()
        self.update()

    def synchronize(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)


class Crew:
    """Control the processes of one engine."""

    def __init__(self, name: str, world_size: int, quick: bool):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # Forked from a process that has loaded everything, but where CUDA may have been touched: it survives no fork.
        context = mp.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        if not torch.cuda.is_available():
            context.set_forkserver_preload([__name__, "gcvit.parallel.zero"])
        self.name = name
        self._processes, self._connections = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
            environment = {"MASTER_ADDR": "127.0.0.1"} | {key: str(value) for key, value in place.items()}
            arguments = (theirs, environment, make_config(name, world_size, quick))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that its end is seen here when the process is gone
            self._processes.append(process)
            self._connections.append(ours)
        self._receive()

    def __len__(self) -> int:
        return len(self._processes)

    def call(self, act: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `act(training, *arguments)` on each rank at once, and return the results. Other crews are asleep."""
        for connection in self._connections:
            connection.send((act, arguments))
        return self._receive()

    def close(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()
            process.join()

    def _receive(self) -> list[Any]:
        try:
            return [connection.recv() for connection in self._connections]
        except EOFError:
            sys.exit(f"a process of {self.name} has died: see above")


@contextmanager
def crews(names: list[str], world_size: int, quick: bool) -> Iterator[dict[str, Crew]]:
    """Start all processes to measure, with each engine built, and close them at the end."""
    with ExitStack() as stack:
        found = {}
        for name in names:
            found[name] = Crew(name, world_size, quick)
            stack.callback(found[name].close)
        yield found


def _serve(connection: Connection, environment: dict[str, str], config: Config) -> None:
    """Serve the requests to a process of a crew, and wait without using the processor."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with join_world() as world:
        training = Training(config, world)
        connection.send(None)
        while True:
            act, arguments = connection.recv()
            connection.send(act(training, *arguments))
