"""Predict the memory of a config on any number of devices, for any micro-batch, in seconds and without a device.

A step is recorded for two micro-batches. Other sizes follow a line through both, event by event: the elements of every
tensor are proportional to the images, constant, or the sum of both.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gcvit.config.schema import Config, FsdpConfig, ZeroConfig
from gcvit.data.batch_plan import BatchPlan
from gcvit.errors import UserError
from gcvit.model import GCViT
from gcvit.model.from_config import build_model
from gcvit.parallel.activation_budget import Compute, choose_parts
from gcvit.parallel.activation_checkpointing import recompute, recompute_parts
from gcvit.parallel.build import DTYPES
from gcvit.planning.memory_simulator import Layout, Memory, SimulatedDdp, SimulatedFsdp, SimulatedStep
from gcvit.planning.memory_simulator_zero import SimulatedZero3, SimulatedZero12
from gcvit.planning.step_trace import Event, compute_as_on_gpu, record_step

MODES = ("none", "selective", "blocks", "full")
GPUS_PER_NODE = 8
_RECORDED = (8, 16)  # images
_Key = tuple[str, int | None, str, bool]  # mode and budget, precision, autocast


@dataclass(frozen=True)
class _Record:
    """A step's events: what each adds to the memory [e], and those that say where the step is, by their place."""

    num_bytes: npt.NDArray[np.int64]
    marks: list[tuple[int, Event]]


class Forecast:
    """Predicts the memory of configs that differ in engine, recomputation and micro-batch, not in their model.

    Of GPUs `runs_triton` says whether they are new enough for our kernels. Drop path that skips images keeps another
    number of them in each step: none is taken to be skipped, which is the most that a step can take.
    """

    def __init__(self, config: Config, *, on_gpu: bool, runs_triton: bool = True):
        with torch.device("meta"):
            self.model = build_model(config.model.model_copy(update={"drop_path_skips": False}))
        if on_gpu:
            compute_as_on_gpu(self.model, runs_triton=runs_triton)
        self._layout = Layout(self.model)
        self._on_gpu = on_gpu
        self._records: dict[tuple[_Key, int], _Record] = {}

    def predict(self, config: Config, world_size: int, num_images: int) -> Memory:
        """Predict a training step of this config, with `num_images` in a full micro-batch.

        Raises:
            UserError: The activation budget is too small.
        """
        micro_steps = BatchPlan.from_config(config, world_size, num_images).num_micro_steps
        simulated_step = simulator_of(config)(config, self._layout, world_size, micro_steps, self._on_gpu)
        return simulated_step.simulate(self._events(config, num_images))

    def largest(self, config: Config, world_size: int, limit_bytes: float) -> int:
        """Find the most images of a micro-batch whose step fits the limit; 0 if none does.

        The result may exceed a rank's share of the global batch.
        """
        batch_plan = BatchPlan.from_config(config, world_size, None)
        unit = batch_plan.unit
        fits, fails = 0, batch_plan.largest_share // unit
        # A share without accumulation holds less for the same images: it stands apart.
        while self._fits(config, world_size, fails * unit, limit_bytes):
            fits, fails = fails, 2 * fails
        while fails - fits > 1:
            middle = (fits + fails) // 2
            if self._fits(config, world_size, middle * unit, limit_bytes):
                fits = middle
            else:
                fails = middle
        return fits * unit

    def recomputing(self, config: Config, num_images: int) -> GCViT:
        """Return a copy of the model with the config's recomputation for such a micro-batch."""
        model = copy.deepcopy(self.model)
        if config.activation_budget_bytes is None:
            recompute_parts(model, config.activation_checkpointing)
        else:
            compute = Compute(torch.device("cpu"), DTYPES[config.precision], autocast=config.engine == "ddp")
            choice = choose_parts(model, compute, num_images, config.activation_budget_bytes, _count_flops)
            recompute(model, choice.names)
        return model

    def _fits(self, config: Config, world_size: int, num_images: int, limit_bytes: float) -> bool:
        try:
            return self.predict(config, world_size, num_images).peak <= limit_bytes
        except UserError:  # an activation budget that is too small for so many
            return False

    def _events(self, config: Config, num_images: int) -> list[Event]:
        if config.activation_budget_bytes is not None:  # which chooses other parts for another number
            record = self._record(config, num_images)
            return condense(record.num_bytes, record.marks)
        first, second = (self._record(config, number) for number in _RECORDED)
        assert len(first.num_bytes) == len(second.num_bytes), "other operations for another number of images"
        slope = (second.num_bytes - first.num_bytes) / (_RECORDED[1] - _RECORDED[0])
        return condense(np.rint(first.num_bytes + slope * (num_images - _RECORDED[0])), first.marks)

    def _record(self, config: Config, num_images: int) -> _Record:
        autocast = config.engine == "ddp" and config.precision != "fp32"
        mode, budget = config.activation_checkpointing, config.activation_budget_bytes
        key = ((mode, budget, config.precision, autocast), num_images)
        if key not in self._records:
            events = record_step(
                self.recomputing(config, num_images),
                num_images=num_images,
                dtype=DTYPES[config.precision],
                autocast=autocast,
            )
            num_bytes = np.array([event.num_bytes for event in events], dtype=np.int64)
            self._records[key] = _Record(num_bytes, [(i, event) for i, event in enumerate(events) if event.what])
        return self._records[key]


def condense(num_bytes: npt.NDArray[Any], marks: list[tuple[int, Event]]) -> list[Event]:
    """Keep the marks, and between two of them only the rise to the peak and the fall after it."""
    total = np.cumsum(num_bytes)
    events, start, base = [], 0, 0
    for place, mark in [*marks, (len(total), None)]:
        if place > start:
            rise, end = max(0, int(total[start:place].max()) - base), int(total[place - 1])
            events += [Event(n) for n in (rise, end - base - rise) if n]
            base = end
        if mark is not None:
            events.append(mark)
        start = place + 1
    return events


def _count_flops(part: nn.Module, inputs: Iterable[tuple[torch.Size, torch.dtype]], compute: Compute) -> float:
    """Count the FLOPs of a part's forward pass, in place of its time, which cannot be measured here."""
    tensors = [torch.empty(shape, device="meta") for shape, _ in inputs]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        part(*tensors)
    return 1.0 + counter.get_total_flops()


def simulator_of(config: Config) -> type[SimulatedStep]:
    """Return the simulator of the config's engine."""
    if config.engine == "ddp":
        return SimulatedDdp
    if config.engine == "fsdp":
        return SimulatedFsdp
    return SimulatedZero3 if (config.zero or ZeroConfig()).stage == 3 else SimulatedZero12


def engine_name(config: Config, world_size: int) -> str:
    """Name the engine: ddp, fsdp, hsdp, zero1 to zero3, with +offload."""
    if config.engine == "fsdp":
        fsdp = config.fsdp or FsdpConfig()
        has_replicas = (fsdp.shard_size or world_size) < world_size
        return ("hsdp" if has_replicas else "fsdp") + ("+offload" if fsdp.cpu_offload else "")
    if config.engine == "zero":
        zero = config.zero or ZeroConfig()
        offloads = zero.offload_optimizer or zero.offload_parameters
        return f"zero{zero.stage}" + ("+offload" if offloads else "")
    return config.engine


def with_engine(config: Config, name: str) -> Config:
    """Return the config with another engine, by its `engine_name`, and that engine's default options."""
    sections: dict[str, dict[str, Any]] = {
        "ddp": {"engine": "ddp"},
        "fsdp": {"engine": "fsdp"},
        "hsdp": {"engine": "fsdp", "fsdp": FsdpConfig(shard_size=GPUS_PER_NODE)},
        "zero1": {"engine": "zero", "zero": ZeroConfig(stage=1)},
        "zero2": {"engine": "zero", "zero": ZeroConfig(stage=2)},
        "zero3": {"engine": "zero", "zero": ZeroConfig(stage=3)},
    }
    return config.model_copy(update={"fsdp": None, "zero": None} | sections[name])


def with_micro_batch(config: Config, micro_batch: int) -> Config:
    return config.model_copy(update={"trainer": config.trainer.model_copy(update={"micro_batch_size": micro_batch})})
