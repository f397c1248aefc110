"""Plan a training before it runs (`train.py --plan`): its memory, speed and data, and whether it can work at all.

Counted: parameters, operations, images, checkpoints. Predicted: memory (`memory_predictor.py`) and scaling
(`scaling.py`). Assumed: the share of the GPUs' peak, bandwidths, and ImageNet-1K if there is no data. `format_plan.py`
prints the plan.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from gcvit.config.schema import Config, FsdpConfig
from gcvit.data.batch_plan import BatchPlan, check_world
from gcvit.data.source import Source
from gcvit.errors import UserError
from gcvit.model import GCViT
from gcvit.model.flops import TRAINING_PASSES, count_forward_flops
from gcvit.model.from_config import build_model
from gcvit.optim.adamw import decays
from gcvit.optim.lr_schedule import Schedule, build_schedule, to_steps
from gcvit.parallel.build import DTYPES
from gcvit.parallel.deepspeed_config import build_settings
from gcvit.parallel.fsdp import check_shards
from gcvit.planning.memory_predictor import (
    GPUS_PER_NODE,
    MODES,
    Forecast,
    engine_name,
    with_engine,
    with_micro_batch,
)
from gcvit.planning.memory_simulator import Memory
from gcvit.planning.scaling import EMA_BYTES, UPDATE_BYTES, Profile, Scaling, Setup, predict_scaling, profile_model
from gcvit.runtime.gpu_specs import Device, find_device, get_device

ROOM = 0.9
"""Share of a GPU's memory that a step may use. The rest is for CUDA's context, NCCL, workspaces and gaps."""
ASSUMED_MFU = 0.30
"""Assumed share of the peak that a GPU reaches while it computes. It is not measured here."""
ASSUMED_GPU = "h100-80"
_SMALL = 8  # images: a GPU that computes fewer at once is used badly, so that other changes are proposed first


@dataclass(frozen=True)
class Data:
    """The training data; `num_shards` is None if it is unknown."""

    name: str
    num_samples: int
    num_val: int
    bytes_per_image: float
    num_shards: int | None
    is_chunked: bool = True
    """As `Source.is_chunked`."""


# The mean is that of ILSVRC2012_img_train.tar, 147,897,477,120 bytes, over its images.
IMAGENET = Data("ImageNet-1K (assumed: there is no data.dir)", 1_281_167, 50_000, 115_440.0, None)


@dataclass(frozen=True)
class Cell:
    """An engine with a mode of recomputation: its memory with the plan's micro-batch, and the most images that fit."""

    engine: str
    mode: str
    memory: Memory
    largest: int


@dataclass(frozen=True)
class Plan:
    """A training that fits."""

    config: Config
    data: Data
    device: Device
    num_gpus: int
    mfu: float
    schedule: Schedule
    forward_flops: int
    """FLOPs of an image's forward pass."""
    recomputing: float
    """Operations of a step, as a multiple of those without recomputing."""
    num_parameters: int
    num_undecayed: int
    num_tensors: int
    batch_plan: BatchPlan
    memory: Memory
    cells: tuple[Cell, ...]
    profile: Profile | None
    """For the scaling over several GPUs."""

    @property
    def train_flops(self) -> float:
        """Compute the FLOPs to train an image, with recomputation."""
        return TRAINING_PASSES * self.forward_flops * self.recomputing

    @property
    def flops_per_second(self) -> float:
        """Compute what one GPU does at the assumed share of its peak."""
        return self.mfu * self.device.peaks[self.config.precision]

    @property
    def images_per_second(self) -> float:
        """Compute the speed of all GPUs, without waits for data or messages; the largest share of a batch decides."""
        of_each = self.flops_per_second / self.train_flops
        return of_each * self.config.global_batch_size / self.batch_plan.largest_share

    @property
    def scaling(self) -> Scaling | None:
        """Predict the scaling over the plan's GPUs; None for one GPU, and where `find_obstacle` has a reason."""
        if self.profile is None:
            return None
        config, fsdp = self.config, self.config.fsdp or FsdpConfig()
        setup = Setup(
            num_gpus=self.num_gpus,
            micro_seconds=self.batch_plan.capacity * self.train_flops / self.flops_per_second,
            num_micro_steps=self.batch_plan.num_micro_steps,
            shard_size=fsdp.shard_size,
            reshard=fsdp.reshard_after_forward,
            weight_bytes=DTYPES[config.precision].itemsize,
            gradient_bytes=2 if fsdp.reduce_dtype == "bf16" else 4,
            update_bytes=UPDATE_BYTES + (EMA_BYTES if config.ema else 0),
        )
        return predict_scaling(engine_name(config, self.num_gpus), self.device.name, self.profile, setup)

    @property
    def num_trained(self) -> int:
        return self.schedule.total_steps * self.config.global_batch_size

    @property
    def num_evaluations(self) -> int:
        config = self.config
        length = {"global_batch_size": config.global_batch_size, "samples_per_epoch": self.data.num_samples}
        return math.ceil(self.schedule.total_steps / max(1, to_steps(config.trainer.eval_every, **length)))

    @property
    def num_evaluated(self) -> int:
        """Count the images evaluated, by the weights and by their EMA."""
        return self.num_evaluations * self.data.num_val * (2 if self.config.ema else 1)

    @property
    def hours(self) -> float:
        flops = self.num_trained * self.train_flops + self.num_evaluated * self.forward_flops
        return flops / self.train_flops / self.images_per_second / 3600

    @property
    def checkpoint_bytes(self) -> int:
        """Compute the size of a checkpoint: parameters, two moments and the EMA in fp32."""
        return 4 * self.num_parameters * (4 if self.config.ema else 3)


def make_plan(
    config: Config,
    sources: tuple[Source, Source] | None = None,
    *,
    num_gpus: int | None = None,
    gpu: str | None = None,
    mfu: float | None = None,
) -> Plan:
    """Plan a config for so many GPUs (None: those of this job, or machine) of a kind (None: this machine's).

    Raises:
        UserError: The training cannot work. The hint is the nearest config that does, if there is one.
    """
    device, num_gpus = choose_device(gpu), count_gpus() if num_gpus is None else num_gpus
    if num_gpus < 1:
        raise UserError("no plan", got=f"--gpus {num_gpus}", expected="1 or more", hint="say how many there will be")
    if mfu is not None and not 0 < mfu <= 1:
        hint = "give a share, such as the mfu of a run's metrics.jsonl"
        raise UserError("no plan", got=f"--mfu {mfu}", expected="above 0, at most 1", hint=hint)
    if config.precision not in device.peaks:
        raise UserError(
            f"{device.name} does not compute in {config.precision}",
            got=f"precision={config.precision}",
            expected=", ".join(device.peaks),
            hint="set precision=fp16" if config.precision == "bf16" else None,
        )
    data = IMAGENET
    if sources is not None:
        train, val = sources
        check_world(train.num_samples, num_gpus)
        mean = float(train.length.mean(dtype="float64"))
        places = (len(train.first) - 1, train.is_chunked)
        data = Data(str(config.data.dir), train.num_samples, val.num_samples, mean, *places)
    schedule = build_schedule(
        config.schedule, config.optim, global_batch_size=config.global_batch_size, samples_per_epoch=data.num_samples
    )
    forecast = Forecast(config, on_gpu=True, runs_triton=device.runs_triton)
    if config.zero and config.zero.extra:
        from gcvit.parallel.zero import check_settings  # loads DeepSpeed

        check_settings(build_settings(config.optim, config.zero, forecast.model, 1, DTYPES[config.precision]), "cuda")
    if config.engine == "fsdp":
        check_shards(forecast.model, (config.fsdp or FsdpConfig()).shard_size or num_gpus, num_gpus)
    limit = ROOM * device.memory_bytes
    if config.trainer.micro_batch_size == "auto":
        shares = BatchPlan.from_config(config, num_gpus, None)
        config = with_micro_batch(config, shares.split_evenly(forecast.largest(config, num_gpus, limit)))
    batch_plan = BatchPlan.from_config(config, num_gpus, config.trainer.resolved_micro_batch_size)
    micro_batch = batch_plan.capacity
    memory = forecast.predict(config, num_gpus, micro_batch)
    if memory.peak > limit:
        raise UserError(
            f"the training does not fit on {num_gpus} x {device.name}",
            got=f"{memory.peak / 1e9:,.1f} GB in {memory.moment}, of micro-batches of {micro_batch}",
            expected=f"{limit / 1e9:,.1f} GB ({ROOM:.0%} of its memory)",
            hint=propose(config, forecast, num_gpus, limit),
        )
    shapes = {name: tuple(p.shape) for name, p in forecast.model.named_parameters()}
    bias_tables = config.optim.decay_bias_tables
    return Plan(
        config=config,
        data=data,
        device=device,
        num_gpus=num_gpus,
        mfu=ASSUMED_MFU if mfu is None else mfu,
        schedule=schedule,
        forward_flops=count_forward_flops(forecast.model, config.model.img_size),
        recomputing=count_recomputing(config, forecast, micro_batch),
        num_parameters=sum(map(math.prod, shapes.values())),
        num_undecayed=sum(not decays(name, shape, decay_bias_tables=bias_tables) for name, shape in shapes.items()),
        num_tensors=len(shapes),
        batch_plan=batch_plan,
        memory=memory,
        cells=tuple(compare(config, forecast, num_gpus, micro_batch, limit)),
        profile=profile_config(config) if num_gpus > 1 else None,
    )


def profile_config(config: Config) -> Profile:
    """Profile the config's model for the scaling over several GPUs."""
    with torch.device("meta"):
        model = build_model(config.model.model_copy(update={"drop_path_skips": False}))
    return profile_model(model, (config.fsdp or FsdpConfig()).unit_parameters)


def choose_device(gpu: str | None) -> Device:
    """Return the named kind of GPU, or this machine's, or `ASSUMED_GPU`.

    Raises:
        UserError: The kind is unknown.
    """
    if gpu is not None:
        return get_device(gpu)
    if not torch.cuda.is_available():
        return get_device(ASSUMED_GPU)
    name = torch.cuda.get_device_name()
    if (found := find_device(name)) is None:
        raise UserError("this machine's GPU is not in the table of plans", got=name, hint="name one with --gpu")
    return found


def count_gpus() -> int:
    """Count the GPUs of this job, or of this machine; 1 if there is none."""
    return int(os.environ.get("WORLD_SIZE", 0)) or torch.cuda.device_count() or 1


def compare(config: Config, forecast: Forecast, num_gpus: int, micro_batch: int, limit: float) -> Iterator[Cell]:
    """Predict every engine in every mode, the plan's own among them."""
    own = [] if config.activation_checkpointing in MODES else [config]  # by a budget of its own
    for by_engine in _engines(config, forecast, num_gpus):
        for by_mode in [*own, *_modes(by_engine, MODES)]:
            own = []
            yield Cell(
                engine_name(by_mode, num_gpus),
                by_mode.activation_checkpointing,
                forecast.predict(by_mode, num_gpus, micro_batch),
                forecast.largest(by_mode, num_gpus, limit),
            )


def propose(config: Config, forecast: Forecast, num_gpus: int, limit: float) -> str:
    """Propose the nearest config that fits: smaller micro-batches, then more recomputation, then another engine."""
    later_modes = MODES[MODES.index(config.activation_checkpointing) + 1 :] if config in _modes(config, MODES) else ()
    own = [config, *_modes(config, later_modes)]
    _, *others = _engines(config, forecast, num_gpus)
    others.sort(key=lambda other: other.engine != config.engine)
    candidates = [*own, *(by_mode for other in others for by_mode in _modes(other, MODES))]
    shares = BatchPlan.from_config(config, num_gpus, None)
    for enough in (min(_SMALL, shares.largest_share), 1):
        for candidate in candidates:
            most = forecast.largest(candidate, num_gpus, limit)
            if most >= enough:
                micro_batch = shares.split_evenly(most)
                peak = forecast.predict(candidate, num_gpus, micro_batch).peak
                return f"{' '.join(_overrides(config, candidate, micro_batch))}, which takes {peak / 1e9:,.1f} GB"
    return "take more GPUs, or larger ones: without offloading nothing fits these"


def _overrides(config: Config, candidate: Config, micro_batch: int) -> Iterator[str]:
    """Yield the overrides that turn `config` into `candidate`."""
    if candidate.engine != config.engine:
        yield f"engine={candidate.engine}"
    if (candidate.fsdp, candidate.zero) != (config.fsdp, config.zero):
        for name in ("fsdp", "zero"):
            if getattr(config, name) is not None:
                yield f"{name}=null"
        if candidate.fsdp and candidate.fsdp.shard_size:
            yield f"fsdp.shard_size={candidate.fsdp.shard_size}"
        if candidate.zero:
            yield f"zero.stage={candidate.zero.stage}"
    if candidate.activation_checkpointing != config.activation_checkpointing:
        yield f"activation_checkpointing={candidate.activation_checkpointing}"
        if config.activation_budget_bytes is not None:
            yield "activation_budget_bytes=null"
    yield f"trainer.micro_batch_size={micro_batch}"


def _modes(config: Config, modes: tuple[str, ...]) -> list[Config]:
    return [
        config.model_copy(update={"activation_checkpointing": mode, "activation_budget_bytes": None}) for mode in modes
    ]


def _engines(config: Config, forecast: Forecast, num_gpus: int) -> list[Config]:
    """List the config with each available engine; its own first, with its own options."""
    own = engine_name(config, num_gpus)
    names = ["ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"]
    if num_gpus <= GPUS_PER_NODE or num_gpus % GPUS_PER_NODE:
        names.remove("hsdp")
    if config.compile:
        names.remove("zero3")
    try:
        check_shards(forecast.model, num_gpus, num_gpus)
    except UserError:
        names.remove("fsdp")
    others = [with_engine(config, name) for name in names if name != own]
    return [config, *others]


def count_recomputing(config: Config, forecast: Forecast, micro_batch: int) -> float:
    """Count the operations of a step, as a multiple of those without recomputing."""
    if config.activation_checkpointing == "none":
        return 1.0
    return _count_step(forecast.recomputing(config, micro_batch)) / _count_step(forecast.model)


def _count_step(model: GCViT) -> int:
    """Count the FLOPs of forward and backward of an image, on meta."""
    with FlopCounterMode(display=False) as counter:
        model.train()(torch.empty(2, *model.input_size, device="meta")).sum().backward()
    model.zero_grad()
    return int(counter.get_total_flops()) // 2
