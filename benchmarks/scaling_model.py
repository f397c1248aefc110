"""The time of a training step on many GPUs, by what engines send and how fast links are. Used by `benchmarks.scaling`.

A step is played through once, as one GPU of many sees it: a clock for the computing stream and one for each level of
links, which carry one message at a time. What is sent, in which pieces and when it can start is read off the engines
(`gcvit/parallel`); how long a message takes is what NCCL itself expects of its rings and trees. All times are
seconds, all sizes bytes. `docs/scaling.md` states the assumptions.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gcvit.model import create_model
from gcvit.parallel.deepspeed_config import _sizes
from gcvit.parallel.fsdp import find_units

ENGINES = ("ddp", "fsdp", "hsdp", "zero2", "zero3")
MIB = 2**20
DDP_BUCKETS = (1 * MIB, 25 * MIB)  # PyTorch's default: the first one, and all others
# Of fp32 states, per parameter: AdamW reads 4 and writes 3, the norm reads 1, clipping reads and writes 1, the EMA
# reads 2 and writes 1.
UPDATE_BYTES = 4 * (7 + 1 + 2 + 3)


# ---- links and collectives -----------------------------------------------------------------------


@dataclass(frozen=True)
class Links:
    """What a message meets: bandwidths in bytes per second, of one GPU, one way, as collectives reach them."""

    nvlink: float
    network: float  # a GPU's share of its node's
    post: float  # seconds in which a host hands a message to the network
    memory: float  # of the GPU's own memory
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Group:
    """The GPUs that take part in a collective: as many in each of its nodes."""

    num_nodes: int
    per_node: int

    @property
    def size(self) -> int:
        return self.num_nodes * self.per_node


@dataclass(frozen=True)
class Message:
    """A collective over a group, of `num_bytes` in all: the whole tensor, of which all-gather gives each rank all."""

    kind: str  # all_gather, reduce_scatter, all_reduce
    num_bytes: float
    group: Group

    @property
    def sent(self) -> float:
        """Bytes that a rank sends if it goes around in a ring."""
        factor = 2 if self.kind == "all_reduce" else 1
        return factor * self.num_bytes * (self.group.size - 1) / self.group.size


@dataclass(frozen=True)
class Protocol:
    """A way in which NCCL moves bytes: what it keeps of the bandwidth, and what a call and each hop take."""

    kept: float
    call: float
    node_hop: float
    network_hop: float
    most: float = math.inf  # bytes per second


# NCCL's own constants, by which it chooses: src/graph/tuning.cc at b6475625 of https://github.com/NVIDIA/nccl,
# baseLat, hwLat (NVLink, network) and the factors below "Various model refinements". Its corrections for trees of
# middling size are left out, as is NVLink SHARP.
RINGS = (
    Protocol(1 / 4, 6.6e-6, 0.6e-6, 2.7e-6, most=20e9),  # LL
    Protocol(0.92, 14.0e-6, 1.9e-6, 4.0e-6),  # LL128
    Protocol(1.0, 8.4e-6, 3.4e-6, 14.0e-6),  # Simple
)
TREES = (
    Protocol(0.92 / 3.8, 6.8e-6, 0.6e-6, 5.0e-6, most=20e9),
    Protocol(0.92 * 120 / 128, 14.0e-6, 1.25e-6, 8.5e-6),
    Protocol(0.92, 0.0, 28.0e-6, 28.0e-6),
)


def collective_seconds(message: Message, links: Links) -> float:
    """The quickest of NCCL's rings, and for an all-reduce of its trees."""
    group = message.group
    if group.size == 1:
        return 0.0
    bandwidth = math.inf if group.per_node == 1 else links.nvlink
    if group.num_nodes > 1:
        # As many rings side by side as the group has GPUs in a node, each over one GPU's share of the network.
        bandwidth = min(bandwidth, group.per_node * links.network)
    reduces = message.kind == "all_reduce"
    num_hops = (2 if reduces else 1) * (group.size - 1)
    network_hops = 0 if group.num_nodes == 1 else 2 * group.num_nodes if reduces else group.num_nodes - 1
    times = []
    for protocol in RINGS:
        node_hop = protocol.node_hop if group.num_nodes == 1 else max(protocol.node_hop, links.post)
        latency = protocol.call + (num_hops - network_hops) * node_hop + network_hops * protocol.network_hop
        times.append(latency + message.sent / min(protocol.kept * bandwidth, protocol.most))
    if group.num_nodes == 2:
        # A tree of two nodes sends everything across once each way, a ring almost twice.
        bandwidth = min(links.nvlink if group.per_node > 1 else math.inf, 2 * group.per_node * links.network)
    for protocol in TREES if reduces else ():
        hops = (group.per_node - 1) * protocol.node_hop + math.log2(group.num_nodes) * protocol.network_hop
        rate = min(protocol.kept * bandwidth, protocol.most)
        times.append(protocol.call + 2 * hops + 2 * message.num_bytes / rate)
    return min(times)


# ---- the model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A place where the model is cut, or what remains: its parameters, and FLOPs of an image's forward pass."""

    shapes: tuple[tuple[int, ...], ...]
    flops: float

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


@dataclass(frozen=True)
class Profile:
    """A model as its engines see it."""

    parts: tuple[Part, ...]  # in forward order; the last is the root, norm and head
    units: tuple[int, ...]  # FSDP gathers so many neighbouring parts at once, and the root by itself
    num_operations: int  # that a training step launches, whatever its batch; 0 is not counted

    @property
    def num_parameters(self) -> int:
        return sum(part.num_parameters for part in self.parts)

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts)


class _Operations(TorchDispatchMode):
    """While entered, counts operations that compute something."""

    count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (op.is_view or op._schema.name in ("aten::_unsafe_view", "aten::new_empty"))
        return op(*args, **(kwargs or {}))


def profile_variant(variant: str, unit_parameters: int = 4_000_000) -> Profile:
    """A GC ViT at its own resolution, counted without memory; FSDP's units are those of `FsdpConfig`'s default."""
    with torch.device("meta"):
        model = create_model(variant)
        images = torch.empty(2, *model.input_size)
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            model.eval()(images[:1])
        with _Operations() as operations:
            model.train()(images).sum().backward()
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
    """When the computing stream and the links of each level are free, and what was sent."""

    links: Links
    compute: float = 0.0
    free: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})  # by whether between nodes
    messages: list[Message] = field(default_factory=list)

    def run(self, seconds: float, after: float = 0.0) -> None:
        self.compute = max(self.compute, after) + seconds

    def send(self, message: Message, after: float) -> float:
        """When it has arrived, if it may start at `after`."""
        between = message.group.num_nodes > 1
        self.free[between] = max(self.free[between], after) + collective_seconds(message, self.links)
        self.messages.append(message)
        return self.free[between]


@dataclass(frozen=True)
class Setup:
    """What a step does: on how many GPUs, in how many micro-steps, each computing for how long on one of them."""

    num_gpus: int
    micro_seconds: float  # forward and backward of a micro-batch
    num_micro_steps: int = 1
    reshard: bool = False  # `fsdp.reshard_after_forward`; the configs for several nodes say no
    weight_bytes: int = 2  # bf16, in which fsdp and zero compute; ddp computes by autocast from fp32
    gradient_bytes: int = 4  # all engines sum gradients in fp32
    buckets: tuple[float, float] = DDP_BUCKETS
    update_bytes: int = UPDATE_BYTES


@dataclass(frozen=True)
class Step:
    seconds: float
    messages: list[Message]

    @property
    def sent(self) -> float:
        return sum(message.sent for message in self.messages)


def play_step(engine: str, profile: Profile, setup: Setup, links: Links) -> Step:
    """One training step of an engine. hsdp is fsdp with a copy of the model in each node."""
    clock = Clock(links)
    world = Group(max(1, setup.num_gpus // links.gpus_per_node), min(setup.num_gpus, links.gpus_per_node))
    shard = Group(1, world.per_node) if engine == "hsdp" else world
    assert world.size == setup.num_gpus, f"{setup.num_gpus} GPUs do not fill nodes of {links.gpus_per_node}"
    for micro_step in range(setup.num_micro_steps):
        is_last = micro_step == setup.num_micro_steps - 1
        if engine == "ddp":
            first, limit = setup.buckets
            _compute_and_reduce(clock, profile, setup, world, limit if is_last else None, first)
        elif engine == "zero2":
            size = setup.gradient_bytes * _sizes(2, profile.num_parameters)["reduce_bucket_size"]
            _compute_and_reduce(clock, profile, setup, world, size)
        elif engine == "zero3":
            _gather_parts(clock, profile, setup, world)
        else:
            replicas = Group(world.num_nodes, 1) if engine == "hsdp" else Group(1, 1)
            _gather_units(clock, profile, setup, shard, replicas, reduces=is_last)
    # The norm of all gradients, of which only ddp's ranks hold all: nothing is clipped before it is known.
    if engine in ("fsdp", "hsdp"):
        clock.run(0.0, clock.send(Message("all_gather", 4 * shard.size, shard), clock.compute))
    elif engine != "ddp":
        for _ in range(2):  # and whether any rank met what is not finite
            clock.run(0.0, clock.send(Message("all_reduce", 4, world), clock.compute))
    holders = 1 if engine == "ddp" else shard.size
    clock.run(setup.update_bytes * profile.num_parameters / holders / links.memory)
    if engine == "zero2":
        # DeepSpeed waits for it: one for the parameters that decay, one for the others; the split is of no matter.
        half = setup.weight_bytes * profile.num_parameters / 2
        for _ in range(2):
            clock.run(0.0, clock.send(Message("all_gather", half, world), clock.compute))
    return Step(clock.compute, clock.messages)


def _seconds_per_flop(profile: Profile, setup: Setup) -> float:
    return setup.micro_seconds / (3 * profile.flops)  # backward computes twice as much as forward


def fill_buckets(sizes: Sequence[Sequence[float]], limit: float, first: float | None = None) -> list[list[float]]:
    """The buckets that are full after each part, given the sizes of its gradients in the order of backward.

    DDP's (which have a `first` limit) are full when the limit is reached, DeepSpeed's before it would be exceeded.
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
    """A micro-step of ddp or zero2: buckets are summed over all ranks while backward goes on; then it waits for them.

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
    """A micro-step of fsdp. The next unit is gathered while one computes; the last and the root are kept."""
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
            following = gather(i + 1, start)
        clock.run(unit * part.flops, start)
        arrived = following
    clock.run(3 * unit * root.flops)
    for i in reversed(range(len(units))):
        start = max(clock.compute, arrived)
        if i > 0 and setup.reshard:
            arrived = gather(i - 1, start)
        clock.run(2 * unit * units[i].flops, start)
        if reduces:
            reduced = reduce(i)
    if reduces:
        clock.run(0.0, max(reduced, reduce(-1)))  # the root's come last: its hook runs when backward ends


def _join(profile: Profile) -> Iterator[Part]:
    """FSDP's units, each as one part."""
    start = 0
    for count in profile.units:
        parts = profile.parts[start : start + count]
        yield Part(sum((part.shapes for part in parts), ()), sum(part.flops for part in parts))
        start += count
    assert start == len(profile.parts) - 1, "units are not all parts but the root"


def _count_padded_rows(part: Part, num_shards: int) -> int:
    """Elements that are sent of a part: FSDP2 gives all ranks as many rows of a parameter, filling up the last."""
    return sum(-(-shape[0] // num_shards) * num_shards * math.prod(shape[1:]) for shape in part.shapes)


def can_shard(profile: Profile, num_shards: int) -> bool:
    """Whether every rank gets something: else `FsdpEngine` refuses."""
    last = num_shards - 1
    return any(last * -(-shape[0] // num_shards) < shape[0] for part in profile.parts for shape in part.shapes)


def _gather_parts(clock: Clock, profile: Profile, setup: Setup, world: Group) -> None:
    """A micro-step of zero3: the next part is gathered while one computes; gradients are scattered in buckets."""
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
    """Elements that are sent of a parameter: DeepSpeed cuts it flat and fills up the last rank's piece."""
    return -(-math.prod(shape) // num_shards) * num_shards
