"""The memory of a training on each device, predicted without one: what an engine holds, and the peak of a step.

A step is recorded once (`step_trace.py`) and simulated for each engine: weights are gathered and freed, gradients
copied, summed and kept. What is held and in which pieces follows the engines (`gcvit/parallel`), and FSDP2 of PyTorch
2.15; `memory_simulator_zero.py` follows DeepSpeed.
`docs/planning.md` says what is left out: the memory of kernels' own, of NCCL and of the CUDA context.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from gcvit.config.schema import Config, FsdpConfig
from gcvit.model import GCViT
from gcvit.parallel.build import DTYPES
from gcvit.parallel.fsdp import find_units
from gcvit.planning.step_trace import ROOT, Event

KINDS = ("parameters", "gradients", "moments", "ema", "gathered", "activations")
FP32 = 4
"""Bytes of an element."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest device, by `KINDS`.

    `held` is there between steps, `at_peak` at the fullest moment of a step, in its forward, backward or update; `host`
    is what offloading keeps in the memory of the node, for each device. Gathered: parameters in the form in which they
    are computed with, and buffers of messages.
    """

    held: dict[str, int]
    at_peak: dict[str, int]
    moment: str
    host: int

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())


class Layout:
    """The parameters of a model on meta, and the parts that hold them, in forward order, root last."""

    def __init__(self, model: GCViT):
        self.model = model
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.numel = {name: shape.numel() for name, shape in self.shapes.items()}
        self.num_parameters = sum(self.numel.values())
        self.parts = [*model.cut_points(), ROOT]
        self.part_of = {
            name: next((part for part in self.parts if part and name.startswith(f"{part}.")), ROOT)
            for name in self.shapes
        }
        self.names = {part: [name for name in self.shapes if self.part_of[name] == part] for part in self.parts}
        self.layers = model.find_layers()
        self._units: dict[int, list[list[str]]] = {}

    def units(self, num_parameters: int) -> list[list[str]]:
        """Return the parts that FSDP gathers together, each unit of at least so many parameters; the root is alone."""
        if num_parameters not in self._units:
            sizes = [len(unit) for unit in find_units(self.model, num_parameters)]
            ends = itertools.accumulate(sizes)
            units = [self.parts[end - size : end] for size, end in zip(sizes, ends, strict=True)]
            self._units[num_parameters] = [*units, [ROOT]]
        return self._units[num_parameters]


class SimulatedStep:
    """Simulate a step of an engine: count the bytes in use by kind, and keep those of the peak.

    Subclasses add what an engine allocates beside the model. Engines that exchange gradients once do so while `is_last`
    is true, in the last of `num_micro_steps`.
    """

    def __init__(self, config: Config, layout: Layout, world_size: int, num_micro_steps: int, on_gpu: bool):
        self.config, self.layout, self.world_size = config, layout, world_size
        self.num_micro_steps, self.on_gpu, self.is_last = num_micro_steps, on_gpu, True
        self.dtype = DTYPES[config.precision]
        self.size_of = self.dtype.itemsize
        self._alive: Counter[str] = Counter()
        self._at_peak: dict[str, int] = {}
        self._peak, self._moment, self._peak_moment = -1, "", ""

    def simulate(self, events: Sequence[Event]) -> Memory:
        """Simulate a step whose micro-steps are all as recorded."""
        self.begin()
        held = dict(self._alive)
        num_simulated = min(2, self.num_micro_steps)  # the first one, and one that adds to earlier gradients
        for micro_step in range(num_simulated):
            self.is_last = micro_step == num_simulated - 1
            self._simulate_micro_step(events)
        self._moment = "update"
        self.update()
        return Memory(held, self._at_peak, self._peak_moment, self.host_bytes())

    def _simulate_micro_step(self, events: Iterable[Event]) -> None:
        for num_bytes, what, name in events:
            if num_bytes:
                self.allocate("activations", num_bytes)
            elif what == "gradient":
                self.on_gradient(name)
            else:
                self._moment = {"forward": "forward", "backward": "backward"}.get(what, self._moment)
                getattr(self, f"on_{what}")(name)

    def allocate(self, kind: str, num_bytes: float) -> None:
        """Allocate bytes of a kind, or free them where negative."""
        self._alive[kind] += round(num_bytes)
        total = sum(self._alive.values())
        if total > self._peak:
            self._peak, self._at_peak, self._peak_moment = total, dict(self._alive), self._moment

    def allocate_temporarily(self, kind: str, num_bytes: float) -> None:
        self.allocate(kind, round(num_bytes))
        self.allocate(kind, -round(num_bytes))

    def begin(self) -> None:
        """Allocate what is held between steps."""

    def update(self) -> None:
        """Clip and update; in place unless a subclass overrides it."""

    def host_bytes(self) -> int:
        return 0

    def on_gradient(self, name: str) -> None:
        """Handle a parameter's complete gradient; its activation memory is no longer counted."""

    # Where a part's passes begin and end; forward as a whole ("loss") and backward ("end").
    def on_forward(self, part: str) -> None: ...
    def on_forwarded(self, part: str) -> None: ...
    def on_backward(self, part: str) -> None: ...
    def on_backwarded(self, part: str) -> None: ...
    def on_loss(self, _: str) -> None: ...
    def on_end(self, _: str) -> None: ...

    def hold(self, *, parameters: float, moments: float, ema: float) -> None:
        self.allocate("parameters", parameters)
        self.allocate("moments", moments)
        self.allocate("ema", ema if self.config.ema else 0)


class SimulatedDdp(SimulatedStep):
    """Simulate ddp: everything is replicated, and gradients are views of persistent buckets."""

    def begin(self) -> None:
        whole = FP32 * self.layout.num_parameters
        self.hold(parameters=whole, moments=2 * whole, ema=whole)
        self.allocate("gradients", whole)


class SimulatedFsdp(SimulatedStep):
    """Simulate fsdp: rows are sharded and padded to equally many a rank; units are gathered before their use."""

    def __init__(self, config: Config, layout: Layout, world_size: int, num_micro_steps: int, on_gpu: bool):
        super().__init__(config, layout, world_size, num_micro_steps, on_gpu)
        self.fsdp = config.fsdp or FsdpConfig()
        self.num_shards = self.fsdp.shard_size or world_size
        self.units = layout.units(self.fsdp.unit_parameters)
        self.unit_of = {part: number for number, unit in enumerate(self.units) for part in unit}
        self.padded = [sum(self._pad(name) for part in unit for name in layout.names[part]) for unit in self.units]
        self.reduce_size = 2 if self.fsdp.reduce_dtype == "bf16" else FP32
        self.has_sum = False  # of earlier micro-steps' gradients
        self.gathered: dict[int, int] = {}  # parameters by unit
        self.arriving: dict[int, int] = {}  # messages that bring them
        self.summed: Counter[int] = Counter()  # gradients by unit, until they are exchanged
        self.leaving = 0  # the message that takes them away
        self.unfinished: set[int] = set()

    def begin(self) -> None:
        if not self.fsdp.cpu_offload:
            share = FP32 * sum(self.padded) / self.num_shards
            self.hold(parameters=share, moments=2 * share, ema=share)

    def host_bytes(self) -> int:
        share = FP32 * sum(self.padded) // self.num_shards
        return (5 if self.config.ema else 4) * share if self.fsdp.cpu_offload else 0

    def on_forward(self, part: str) -> None:
        unit = self.unit_of[part]
        if unit in self.gathered:
            return
        self._start_gather(unit)
        # The previous message stays until now, so that its copy overlaps with this one.
        for other in [key for key in self.arriving if key != unit]:
            self.allocate("gathered", -self.arriving.pop(other))
        self._copy_out(unit)

    def on_forwarded(self, part: str) -> None:
        unit = self.unit_of[part]
        stays = unit == len(self.units) - 2 or not self.fsdp.reshard_after_forward
        if part == self.units[unit][-1] and not stays:
            self.allocate("gathered", -self.gathered.pop(unit))

    def on_loss(self, _: str) -> None:
        for unit in list(self.arriving):
            self.allocate("gathered", -self.arriving.pop(unit))
        self.unfinished = set(range(len(self.units)))

    def on_backward(self, part: str) -> None:
        unit = self.unit_of[part]
        if unit not in self.gathered:
            self._start_gather(unit)
            self._copy_out(unit)
            self.allocate("gathered", -self.arriving.pop(unit, 0))
        # The next unit is gathered while this one computes.
        following = unit - 1 if part else len(self.units) - 2
        if following in self.unfinished and following not in self.gathered:
            self._start_gather(following)

    def on_gradient(self, name: str) -> None:
        if not (self.has_sum and self.is_last):
            unit = self.unit_of[self.layout.part_of[name]]
            # Sums over micro-steps have the precision of the exchange.
            num_bytes = self.layout.numel[name] * (self.size_of if self.is_last else self.reduce_size)
            self.summed[unit] += num_bytes
            self.allocate("gradients", num_bytes)

    def on_backwarded(self, part: str) -> None:
        unit = self.unit_of[part]
        if part == self.units[unit][0]:
            self._finish(unit)

    def on_end(self, _: str) -> None:
        for unit in sorted(self.unfinished, reverse=True):  # the root, and the unit of the stem
            self._finish(unit)
        self.allocate("gathered", -self.leaving)
        self.leaving, self.has_sum = 0, True

    def _finish(self, unit: int) -> None:
        """Free a unit's parameters after its backward, and exchange its gradients in the last micro-step."""
        self.unfinished.discard(unit)
        self.allocate("gathered", -self.gathered.pop(unit, 0))
        if self.is_last:
            self.allocate("gathered", -self.leaving)
            self.leaving = self.reduce_size * self.padded[unit]
            self.allocate("gathered", self.leaving)
            self.allocate("gradients", -self.summed.pop(unit, 0))
            share = self.padded[unit] // self.num_shards
            if self.fsdp.cpu_offload:
                self.allocate_temporarily("gradients", self.reduce_size * share)
            else:
                self.allocate("gradients", FP32 * share)

    def _start_gather(self, unit: int) -> None:
        if unit in self.arriving or self.num_shards == 1:
            return
        self.arriving[unit] = self.size_of * self.padded[unit]
        if self.dtype != torch.float32 or self.fsdp.cpu_offload:  # the cast of the shard, or its copy from the host
            self.allocate("gathered", self.arriving[unit] // self.num_shards)
        self.allocate("gathered", self.arriving[unit])
        if self.dtype != torch.float32 or self.fsdp.cpu_offload:
            self.allocate("gathered", -(self.arriving[unit] // self.num_shards))

    def _copy_out(self, unit: int) -> None:
        self.gathered[unit] = self.size_of * self.padded[unit]
        self.allocate("gathered", self.gathered[unit])

    def _pad(self, name: str) -> int:
        """Count the elements of a parameter, with the last rank's rows padded."""
        shape = self.layout.shapes[name]
        return -(-shape[0] // self.num_shards) * self.num_shards * math.prod(shape[1:])
