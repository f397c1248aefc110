"""The time of a training step on many GPUs and its scaling efficiency, predicted and not measured.

One step is simulated as one GPU of many executes it, with a clock for the compute stream and one for each level of
links, which carry one message at a time. The messages, their sizes and their order follow the engines
(`gcvit/parallel`); `collectives.py` predicts their time. All times are seconds, all sizes bytes. `docs/scaling.md`
states the assumptions. `train.py --plan` and `benchmarks.scaling` use this module.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gcvit.model import GCViT, create_model
from gcvit.parallel.deepspeed_config import _sizes
from gcvit.parallel.fsdp import find_units
from gcvit.planning.collectives import GPU_LINKS, Group, Links, Message, collective_seconds

ENGINES = ("ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")
OPERATION_SECONDS = 5e-6
"""Assumed time of the host to launch one operation: `docs/scaling.md`."""
MIB = 2**20
DDP_BUCKETS = (1 * MIB, 25 * MIB)  # PyTorch's default: the first one, and all others
# In fp32, per parameter: AdamW reads 4 and writes 3, the norm reads 1, clipping reads and writes 1.
UPDATE_BYTES = 4 * (7 + 1 + 2)
EMA_BYTES = 4 * 3  # it reads 2 and writes 1


# ---- the model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of the model between cut points, or the root: its parameters, and FLOPs of an image's forward pass."""

    shapes: tuple[tuple[int, ...], ...]
    flops: float

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


@dataclass(frozen=True)
class Profile:
    """The sizes of a model that decide what an engine sends and when."""

    parts: tuple[Part, ...]  # in forward order; the last is the root, norm and head
    units: tuple[int, ...]  # numbers of neighbouring parts that FSDP gathers at once; the root is alone
    num_operations: int  # operations that a micro-step launches for any batch; 0 means not counted

    @property
    def num_parameters(self) -> int:
        return sum(part.num_parameters for part in self.parts)

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts)


class _Operations(TorchDispatchMode):
    """Count the operations that compute something."""

    count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (op.is_view or op._schema.name in ("aten::_unsafe_view", "aten::new_empty"))
        return op(*args, **(kwargs or {}))


def profile_variant(variant: str, unit_parameters: int = 4_000_000) -> Profile:
    """Profile a GC ViT at its own resolution. The default of `unit_parameters` is that of `FsdpConfig`."""
    with torch.device("meta"):
        return profile_model(create_model(variant), unit_parameters)


def profile_model(model: GCViT, unit_parameters: int) -> Profile:
    """Profile a model on meta: its parts, FSDP's units and the operations of a micro-step. Takes seconds."""
    images = torch.empty(2, *model.input_size, device="meta")
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model.eval()(images[:1])
    with _Operations() as operations:
        model.train()(images).sum().backward()
    model.zero_grad()
    names = model.cut_points()
    counted = {name: sum(c.values()) for name, c in flops.get_flop_counts().items()}
    parts = [
        Part(tuple(tuple(p.shape) for p in model.get_submodule(name).parameters()), counted[f"GCViT.{name}"])
        for name in names
    ]
    root = tuple(tuple(p.shape) for name, p in model.named_parameters() if not name.startswith(tuple(names)))
    parts.append(Part(root, flops.get_total_flops() - sum(part.flops for part in parts)))
    units = tuple(len(unit) for unit in find_units(model, unit_parameters))
    return Profile(tuple(parts), units, operations.count)


# ---- the step ------------------------------------------------------------------------------------


@dataclass
class Clock:
    """The times at which the compute stream and the links of each level are free, and the messages sent so far."""

    links: Links
    compute: float = 0.0
    free: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})  # by whether between nodes
    messages: list[Message] = field(default_factory=list)

    def run(self, seconds: float, after: float = 0.0) -> None:
        self.compute = max(self.compute, after) + seconds

    def send(self, message: Message, after: float) -> float:
        """Send a message that may start at `after`, and return the time of its arrival."""
        between = message.group.num_nodes > 1
        self.free[between] = max(self.free[between], after) + collective_seconds(message, self.links)
        self.messages.append(message)
        return self.free[between]


@dataclass(frozen=True)
class Setup:
    """A training step: its GPUs, its micro-steps and the seconds that each computes."""

    num_gpus: int
    micro_seconds: float  # forward and backward of a micro-batch
    num_micro_steps: int = 1
    shard_size: int | None = None  # GPUs of one copy of the model with hsdp; None: those of a node
    reshard: bool = False  # `fsdp.reshard_after_forward`; false in the configs for several nodes
    weight_bytes: int = 2  # fsdp and zero compute in bf16; ddp's weights stay fp32 under autocast
    gradient_bytes: int = 4  # all engines sum gradients in fp32
    buckets: tuple[float, float] = DDP_BUCKETS
    update_bytes: int = UPDATE_BYTES + EMA_BYTES


@dataclass(frozen=True)
class Step:
    seconds: float
    messages: list[Message]

    @property
    def sent(self) -> float:
        return sum(message.sent for message in self.messages)


def simulate_step(engine: str, profile: Profile, setup: Setup, links: Links) -> Step:
    """Simulate one training step of an engine of `ENGINES`; hsdp is fsdp with several copies of the model.

    The GPUs fill their nodes (`find_obstacle`).
    """
    clock = Clock(links)
    world = shard = _group_of(setup.num_gpus, links)
    if engine == "hsdp":
        shard = _group_of(min(setup.num_gpus, setup.shard_size or links.gpus_per_node), links)
    replicas = Group(world.num_nodes // shard.num_nodes, world.per_node // shard.per_node)
    for micro_step in range(setup.num_micro_steps):
        is_last = micro_step == setup.num_micro_steps - 1
        if engine == "ddp":
            first, limit = setup.buckets
            _compute_and_reduce(clock, profile, setup, world, limit if is_last else None, first)
        elif engine in ("zero1", "zero2"):
            stage = int(engine[-1])
            size = setup.gradient_bytes * _sizes(stage, profile.num_parameters)["reduce_bucket_size"]
            _compute_and_reduce(clock, profile, setup, world, size if stage == 2 or is_last else None)
        elif engine == "zero3":
            _gather_parts(clock, profile, setup, world)
        else:
            _gather_units(clock, profile, setup, shard, replicas, reduces=is_last)
    # Clipping waits for the norm of all gradients, which only ddp's ranks hold whole.
    if engine in ("fsdp", "hsdp"):
        clock.run(0.0, clock.send(Message("all_gather", 4 * shard.size, shard), clock.compute))
    elif engine != "ddp":
        for _ in range(2):  # the norm, and whether a gradient is not finite on any rank
            clock.run(0.0, clock.send(Message("all_reduce", 4, world), clock.compute))
    holders = 1 if engine == "ddp" else shard.size
    clock.run(setup.update_bytes * profile.num_parameters / holders / links.memory)
    if engine in ("zero1", "zero2"):
        # DeepSpeed waits for two gathers: of parameters with decay, and of the others. The split has no effect here.
        half = setup.weight_bytes * profile.num_parameters / 2
        for _ in range(2):
            clock.run(0.0, clock.send(Message("all_gather", half, world), clock.compute))
    return Step(clock.compute, clock.messages)


def _group_of(num_gpus: int, links: Links) -> Group:
    return Group(max(1, num_gpus // links.gpus_per_node), min(num_gpus, links.gpus_per_node))


def _seconds_per_flop(profile: Profile, setup: Setup) -> float:
    return setup.micro_seconds / (3 * profile.flops)  # backward computes twice as much as forward


def fill_buckets(sizes: Sequence[Sequence[float]], limit: float, first: float | None = None) -> list[list[float]]:
    """Return the buckets that are full after each part, given the sizes of its gradients in the order of backward.

    DDP's buckets (with a `first` limit) are full when they reach the limit, DeepSpeed's before they would exceed it.
    """
    full: list[list[float]] = []
    waiting, room = 0.0, limit if first is None else first
    for part in sizes:
        full.append([])
        for size in part:
            if first is None and waiting and waiting + size > room:
                full[-1].append(waiting)
                waiting = 0.0
            waiting += size
            if first is not None and waiting >= room:
                full[-1].append(waiting)
                waiting, room = 0.0, limit
    if waiting:
        full[-1].append(waiting)
    return full


def _compute_and_reduce(
    clock: Clock, profile: Profile, setup: Setup, world: Group, limit: float | None, first: float | None = None
) -> None:
    """Simulate a micro-step of ddp, zero1 or zero2: all-reduce buckets during backward, then wait for the last.

    Without a limit nothing is sent.
    """
    unit = _seconds_per_flop(profile, setup)
    clock.run(unit * profile.flops)
    parts = profile.parts[::-1]
    sizes = [[setup.gradient_bytes * math.prod(shape) for shape in reversed(part.shapes)] for part in parts]
    buckets = fill_buckets(sizes, limit, first) if limit else [[] for _ in parts]
    arrived = 0.0
    for part, full in zip(parts, buckets, strict=True):
        clock.run(2 * unit * part.flops)
        for num_bytes in full:
            arrived = clock.send(Message("all_reduce", num_bytes, world), clock.compute)
    clock.run(0.0, arrived)


def _gather_units(clock: Clock, profile: Profile, setup: Setup, shard: Group, replicas: Group, reduces: bool) -> None:
    """Simulate a micro-step of fsdp: gather the next unit while one computes; the last and the root stay gathered."""
    unit = _seconds_per_flop(profile, setup)
    root, units = profile.parts[-1], list(_join(profile))
    rows = [_count_padded_rows(part, shard.size) for part in (*units, root)]

    def gather(i: int, after: float) -> float:
        return clock.send(Message("all_gather", setup.weight_bytes * rows[i], shard), after)

    def reduce(i: int) -> float:
        scattered = Message("reduce_scatter", setup.gradient_bytes * rows[i], shard)
        arrived = clock.send(scattered, clock.compute)
        if replicas.size > 1:
            share = setup.gradient_bytes * rows[i] / shard.size
            arrived = clock.send(Message("all_reduce", share, replicas), arrived)
        return arrived

    gather(-1, clock.compute)
    arrived = gather(0, clock.compute)
    for i, part in enumerate(units):
        start = max(clock.compute, arrived)
        if i + 1 < len(units):
            arrived = gather(i + 1, start)
        clock.run(unit * part.flops, start)
    clock.run(3 * unit * root.flops)
    for i in reversed(range(len(units))):
        start = max(clock.compute, arrived)
        if i > 0 and setup.reshard:
            arrived = gather(i - 1, start)
        clock.run(2 * unit * units[i].flops, start)
        if reduces:
            reduced = reduce(i)
    if reduces:
        clock.run(0.0, max(reduced, reduce(-1)))  # the root is last: its hook runs when backward ends


def _join(profile: Profile) -> Iterator[Part]:
    """Join the parts of each of FSDP's units to one part."""
    start = 0
    for count in profile.units:
        parts = profile.parts[start : start + count]
        yield Part(sum((part.shapes for part in parts), ()), sum(part.flops for part in parts))
        start += count
    assert start == len(profile.parts) - 1, "units are not all parts but the root"


def _count_padded_rows(part: Part, num_shards: int) -> int:
    """Count the elements sent of a part: FSDP2 pads a parameter so that all ranks have equally many rows."""
    return sum(-(-shape[0] // num_shards) * num_shards * math.prod(shape[1:]) for shape in part.shapes)


def can_shard(profile: Profile, num_shards: int) -> bool:
    """Return whether every rank gets a row of some parameter; otherwise `FsdpEngine` refuses."""
    last = num_shards - 1
    return any(last * -(-shape[0] // num_shards) < shape[0] for part in profile.parts for shape in part.shapes)


def _gather_parts(clock: Clock, profile: Profile, setup: Setup, world: Group) -> None:
    """Simulate a micro-step of zero3: gather the next part while one computes; scatter gradients in buckets."""
    unit = _seconds_per_flop(profile, setup)
    limit = setup.gradient_bytes * _sizes(3, profile.num_parameters)["reduce_bucket_size"]
    for passes, parts in ((1, profile.parts), (2, profile.parts[::-1])):  # forward, backward
        sizes = [[_pad_flat(shape, world.size) for shape in part.shapes] for part in parts]
        gathers = [Message("all_gather", setup.weight_bytes * sum(part), world) for part in sizes]
        buckets = fill_buckets([[setup.gradient_bytes * size for size in part] for part in sizes], limit)
        arrived = clock.send(gathers[0], clock.compute)
        for i, part in enumerate(parts):
            start = max(clock.compute, arrived)
            if i + 1 < len(parts):
                arrived = clock.send(gathers[i + 1], start)
            clock.run(passes * unit * part.flops, start)
            for num_bytes in buckets[i] if passes == 2 else ():
                scattered = clock.send(Message("reduce_scatter", num_bytes, world), clock.compute)
    clock.run(0.0, scattered)


def _pad_flat(shape: tuple[int, ...], num_shards: int) -> int:
    """Count the elements sent of a parameter: DeepSpeed shards it flat and pads the last rank's shard."""
    return -(-math.prod(shape) // num_shards) * num_shards


# ---- efficiency ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scaling:
    """A predicted step on many GPUs, beside that of one GPU with the same engine and as many images a GPU."""

    seconds: float
    alone_seconds: float
    links: Links

    @property
    def efficiency(self) -> float:
        """Speed of a GPU among the others over its speed alone, from 0 to 1."""
        return self.alone_seconds / self.seconds


def find_obstacle(engine: str, gpu: str, num_gpus: int, shard_size: int | None = None) -> str:
    """Return why the scaling of these GPUs cannot be predicted; "" if it can be."""
    if engine not in ENGINES:
        return f"no model of {engine}"
    if gpu not in GPU_LINKS:
        return f"no bandwidths known for {gpu}, only for {', '.join(GPU_LINKS)}"
    per_node = GPU_LINKS[gpu].gpus_per_node
    shard = shard_size if engine == "hsdp" and shard_size else per_node
    if num_gpus > per_node and (num_gpus % per_node or (shard % per_node and per_node % shard)):
        return f"{num_gpus} GPUs or their shards do not fill nodes of {per_node}"
    return ""


def predict_scaling(engine: str, gpu: str, profile: Profile, setup: Setup) -> Scaling | None:
    """Predict the step and the efficiency of a setup; None where `find_obstacle` has a reason."""
    if find_obstacle(engine, gpu, setup.num_gpus, setup.shard_size):
        return None
    launching = OPERATION_SECONDS * profile.num_operations
    setup = replace(setup, micro_seconds=max(launching, setup.micro_seconds))
    links = GPU_LINKS[gpu]
    alone = simulate_step(engine, profile, replace(setup, num_gpus=1), links)
    return Scaling(simulate_step(engine, profile, setup, links).seconds, alone.seconds, links)
