"""Define every option of a run, typed, with a sentence under each; defaults < file < command line.

A config is one YAML file without inheritance. Unknown keys, wrong types and options that would have no effect in the
chosen mode are refused. `None` is absent: a section such as `ema` or `zero` that is absent is off. Durations are texts,
"20 epochs", "500 steps" or "1e6 samples", resolved once by `gcvit.optim.lr_schedule`. `load.py` reads the file.
"""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

DURATION = re.compile(r"^(?P<amount>\d+(\.\d+)?([eE][+-]?\d+)?) (?P<unit>epoch|step|sample)s?$")


def _check_duration(text: str) -> str:
    if not DURATION.match(text) or math.isinf(float(text.split()[0])):
        raise ValueError('a duration is a number and a unit, such as "20 epochs", "500 steps" or "1e6 samples"')
    return text


def _check_length(text: str) -> str:
    if not float(_check_duration(text).split()[0]):
        raise ValueError("a duration above 0")
    return text


def _check_range(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("a range is [low, high], and low may not exceed high")
    return ends


def _check_micro_batch(size: int | str | None) -> int | str | None:
    if size is None or size == "auto" or (isinstance(size, int) and size > 0):
        return size
    raise ValueError("1 or more, auto or null")


Duration = Annotated[str, AfterValidator(_check_duration)]
Length = Annotated[str, AfterValidator(_check_length)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Profile = Annotated[str, Field(pattern=r"^\d+:[1-9]\d*$")]
MicroBatch = Annotated[int | str | None, AfterValidator(_check_micro_batch)]
Range = Annotated[tuple[Positive, Positive], AfterValidator(_check_range)]


class Section(BaseModel):
    """Define a node of the config tree: frozen, no unknown keys, the sentence under each option is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


Stages = tuple[Count, Count, Count, Count]


class OverridesConfig(Section):
    width: Count | None = None
    """Channels of the first stage; each next one has twice as many."""
    depths: Stages | None = None
    """Blocks in each stage."""
    num_heads: Stages | None = None
    """Attention heads in each stage."""
    windows: Stages | None = None
    """Side of each stage's attention windows."""
    mlp_ratio: Positive | None = None
    """Width of the MLPs' hidden layers, as a multiple of the stage's."""
    layer_scale: Positive | None = None
    """Initial value of the layer scale."""


class ModelConfig(Section):
    name: str
    """A variant of gcvit.model, such as gc_vit_large."""
    num_classes: Count = 1000
    """Width of the head; must equal the number of classes in the data."""
    img_size: Annotated[int, Field(ge=32)] = 224
    """Height and width of the input in pixels."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Stochastic depth of the last block, rising linearly from 0; null uses the variant's published value."""
    drop_path_skips: bool = False
    """Do not compute the images that drop path drops, a fixed number per micro-batch: less work, other draws."""
    attention: Literal["auto", "reference", "sdpa", "triton"] = "auto"
    """Attention path: plain PyTorch, PyTorch's fused attention, our Triton kernel, or auto for the fastest of them."""
    overrides: OverridesConfig | None = None
    """Changes to the variant's architecture; null changes nothing."""


class DataConfig(Section):
    dir: str | None = None
    """Folder or URL (https, s3, gs, hf) with train/ and val/: shards, or in a folder also class folders of images."""
    cache_dir: str | None = None
    """Folder on each node for the shards of a URL; null is ~/.cache/gcvit. Refused if `dir` is a folder."""
    cache_bytes: Count | None = None
    """Largest size of cache_dir in bytes; the least recently used shards are deleted first; null is no limit."""
    num_workers: Annotated[int, Field(ge=0)] = 8
    """Loader processes per rank; 0 loads in the training process."""
    prefetch_batches: Count = 4
    """Micro-batches that a rank's loader processes prefetch; all of them work on each."""
    lanes: Count = 1024
    """Lanes of the epoch's order; reads are sequential if the world size divides it and it divides the batch."""
    chunk_bytes: Count = 2_000_000
    """Bytes of consecutive samples that are read together and shuffled as one chunk."""
    shuffle_chunks: Count = 2
    """Chunks per lane in the shuffle buffer; all ranks together hold lanes * shuffle_chunks * chunk_bytes."""
    max_corrupt_fraction: Share = 1e-4
    """Training replaces corrupt samples, and stops when they exceed this share of its samples."""
    exif_orientation: bool = False
    """Turn photographs upright by their EXIF tag; the published models were trained and evaluated without."""
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Evaluation: share of the resized image that the centre crop keeps."""
    eval_resize: Literal["crop", "squash"] = "crop"
    """Evaluation: resize the short side and crop the centre, or squash both sides to the input's size."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean subtracted from pixels in [0, 1]."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation that divides them."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.dir is not None and "://" not in self.dir and (self.cache_dir or self.cache_bytes):
            raise ValueError("cache_dir and cache_bytes have no effect where data.dir is a folder: remove them")
        return self


class AffineConfig(Section):
    degrees: NotNegative = 0.0
    """Largest rotation in either direction, in degrees."""
    translate: Share = 0.0
    """Largest shift in either direction, as a share of the side."""
    scale: Range = (1.0, 1.0)
    """Range of zoom."""
    shear: NotNegative = 0.0
    """Largest shear in either direction, in degrees."""


class MixConfig(Section):
    mixup: NotNegative = 0.8
    """Alpha of mixup's Beta distribution; 0 is off."""
    cutmix: NotNegative = 1.0
    """Alpha of cutmix's Beta distribution; 0 is off."""
    prob: Share = 1.0
    """Probability that a group of samples is mixed at all."""
    switch_prob: Share | None = Field(
        default_factory=lambda section: 0.5 if section.get("mixup") and section.get("cutmix") else None
    )
    """Probability of cutmix where both are on; null is 0.5."""
    group_size: Annotated[int, Field(ge=2, multiple_of=2)] = 32
    """Consecutive samples of the global batch that share one draw of lambda, switch and box."""

    @model_validator(mode="after")
    def _check(self) -> "MixConfig":
        if not self.mixup and not self.cutmix:
            raise ValueError("mixup and cutmix are both 0: write augment.mix=null to switch mixing off")
        if self.switch_prob is not None and not (self.mixup and self.cutmix):
            raise ValueError("switch_prob has no effect unless both mixup and cutmix are above 0: remove it")
        return self


class AugmentConfig(Section):
    scale: Range = (0.08, 1.0)
    """Range of the random crop's area, as a share of the image."""
    ratio: Range = (0.75, 4 / 3)
    """Range of the random crop's aspect ratio."""
    interpolation: Literal["random", "bicubic", "bilinear"] = "random"
    """Resampling of crops; random draws bilinear or bicubic for each."""
    hflip: Share = 0.5
    """Probability of a horizontal flip."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's RandAugment policy; null is off."""
    color_jitter: NotNegative | None = None
    # The published recipe has 0.4, without effect beside its RandAugment.
    """Strength of brightness, contrast and saturation jitter; refused with RandAugment, where it has no effect."""
    affine: AffineConfig | None = None
    """Random affine map after the crop; null is off."""
    erase_prob: Share = 0.25
    """Probability that a random rectangle is replaced by per-pixel noise."""
    mix: MixConfig | None = MixConfig()
    """Mixup and cutmix; null is off."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the target that is spread over all classes."""

    @model_validator(mode="after")
    def _check(self) -> "AugmentConfig":
        if self.rand_augment and self.color_jitter:
            raise ValueError("color_jitter has no effect where rand_augment is on (as in timm): set one to null")
        return self

    @property
    def is_paired(self) -> bool:
        """Return whether samples 2k and 2k+1 of a batch are mixed with each other."""
        return self.mix is not None


class OptimConfig(Section):
    lr: Positive
    """Peak learning rate of AdamW, at this file's global batch."""
    warmup_lr: NotNegative = 1e-6
    """Learning rate at the first step of the warm-up."""
    min_lr: NotNegative = 5e-6
    """Minimum of the cosine, and the rate of the cooldown."""
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    """How lr changes if the command line changes the file's global batch size."""
    weight_decay: NotNegative = 0.05
    """Decoupled weight decay of matrices and convolutions; vectors have none."""
    decay_bias_tables: bool = True
    """Whether relative-position bias tables decay too: the published runs do it, timm does not."""
    layer_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fine-tuning: ratio of each layer's rate to the next layer's, from the head back to the stem; null is 1."""
    frozen_backbone: Length | None = None
    """Fine-tuning: how long the head trains alone, while the other weights accumulate moments; null is never."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Decay of AdamW's first and second moment per step."""
    eps: Positive = 1e-8
    """Term added to the root of the second moment."""
    clip_norm: Positive | None = 5.0
    """Largest global gradient norm; null does not clip."""

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr:g} above lr={self.lr:g}, to which it falls: lower it")
        return self


class ScheduleConfig(Section):
    cosine: Duration
    """Length of the cosine, whose index counts from the first step of the run."""
    warmup: Duration = "0 epochs"
    """The first steps of the cosine are replaced by a linear rise of this length."""
    cooldown: Duration = "0 epochs"
    """Steps at min_lr after the cosine; the run's length is cosine + cooldown."""


class EmaConfig(Section):
    half_life: Length = "2.77 epochs"
    """Time after which a weight counts half in the average; decay .9998 at 1024 samples per step is 2.77 epochs."""


class FsdpConfig(Section):
    reshard_after_forward: bool = True
    """Free gathered parameters after forward and gather them again in backward: less memory, more traffic."""
    unit_parameters: Count = 4_000_000
    """Neighbouring parts of the model are gathered together until they have this many parameters."""
    shard_size: Count | None = None
    """Neighbouring ranks that shard one copy of the model; other copies are replicas (HSDP); null is all ranks."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed over ranks; bf16 halves the traffic and rounds."""
    cpu_offload: bool = False
    """Keep masters, moments and EMA in host memory and update there: less device memory, much slower steps."""


class ZeroConfig(Section):
    stage: Literal[1, 2, 3] = 2
    """1 shards the moments, 2 also the gradients, 3 also the parameters."""
    offload_optimizer: Literal["cpu"] | None = None
    """Where masters and moments are stored and updated; null is the device."""
    offload_parameters: Literal["cpu"] | None = None
    """Where stage 3 stores its shards of the parameters between uses; null is the device."""
    extra: dict[str, Any] | None = None
    """Further keys of DeepSpeed's own configuration, merged into ours; refused if they contradict it."""

    @field_validator("stage", mode="before")
    @classmethod
    def _check_stage(cls, stage: Any) -> Any:
        if stage == 0:
            raise ValueError("stage 0 shards nothing: take engine=ddp, which does that job")
        return stage

    @model_validator(mode="after")
    def _check(self) -> "ZeroConfig":
        if self.offload_parameters and self.stage != 3:
            raise ValueError("offload_parameters has no effect below stage 3, which alone shards them: remove it")
        return self


class TrainerConfig(Section):
    micro_batch_size: MicroBatch = None
    """Samples per device and forward pass; null is a device's share of the global batch; auto is as many as fit."""
    log_every: Length = "50 steps"
    """Time between rows of metrics."""
    eval_every: Length = "1 epoch"
    """Time between evaluations on val; the last step is always evaluated."""
    save_every: Length = "1 epoch"
    """Time between checkpoints; the last step is always saved."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints that are kept, besides the best one."""
    eval_batch_size: Count = 64
    """Samples per device and step in evaluation."""
    max_nonfinite_steps: Count = 10
    """Stop after this many refused steps in a row; a loss or gradient that is not finite refuses a step."""
    hang_timeout: Positive | None = 1800.0
    """Seconds without a step after which a process logs its stacks and ends; null waits forever, for a debugger."""
    deterministic: bool = False
    """On a GPU, use kernels that give the same bits in every run; some are slower. A CPU always does."""
    profile: Profile | None = None
    """START:STEPS writes traces, memory and the most expensive operations of the steps after START to RUN/profile."""

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """Return the finished steps at which `profile` begins and ends."""
        if self.profile is None:
            return None
        start, steps = map(int, self.profile.split(":"))
        return start, start + steps

    @property
    def resolved_micro_batch_size(self) -> int | None:
        """Return `micro_batch_size` after "auto" has become a number, see `gcvit.planning.micro_batch_finder`."""
        assert not isinstance(self.micro_batch_size, str), "auto is not resolved yet"
        return self.micro_batch_size


class Config(Section):
    """Define one run."""

    tag: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is output_dir/tag."""
    output_dir: str = "runs"
    """Folder of all runs."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of weights, order, augmentation, mixing and drop path."""
    global_batch_size: Annotated[int, Field(ge=1)]
    """Samples per optimizer step over all devices; their number changes only micro-batch and accumulation."""
    engine: Literal["ddp", "fsdp", "zero"] = "fsdp"
    """Parallelism: PyTorch DDP without sharding (ddp), PyTorch FSDP2 (fsdp) or DeepSpeed ZeRO (zero)."""
    fsdp: FsdpConfig | None = None
    """Options of engine fsdp; refused with another engine."""
    zero: ZeroConfig | None = None
    """Options of engine zero; refused with another engine."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Compute precision; master weights, moments and EMA are always fp32. fp16 scales the loss."""
    activation_checkpointing: Literal["none", "selective", "blocks", "full", "budget"] = "none"
    """What backward recomputes: nothing, all but linear layers, blocks, all parts, or the parts that a budget needs."""
    activation_budget_bytes: Count | None = None
    """With "budget": bytes that a micro-batch may store for backward on each device; recomputing needs more."""
    compile: bool = False
    """Compile each part of the model with torch.compile: faster steps after minutes of compilation."""
    model: ModelConfig
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig
    schedule: ScheduleConfig
    ema: EmaConfig | None = None
    """Moving average of the weights; it is evaluated too and chooses the best checkpoint; null is off."""
    trainer: TrainerConfig = TrainerConfig()
    wandb: bool = False
    """Send metrics to Weights & Biases too; its own environment variables choose account and project."""

    @model_validator(mode="after")
    def _check(self) -> "Config":
        for name in ("fsdp", "zero"):
            if getattr(self, name) is not None and self.engine != name:
                raise ValueError(f"{name}.* has no effect with engine={self.engine}: remove it or set engine={name}")
        if self.compile and self.zero is not None and self.zero.stage == 3:
            raise ValueError(
                "compile=true cannot be had with zero.stage=3, which gathers weights inside of what would be compiled: "
                "set compile=false, or take engine=fsdp, which shards as much"
            )
        if (self.activation_checkpointing == "budget") != (self.activation_budget_bytes is not None):
            raise ValueError("activation_budget_bytes belongs to activation_checkpointing=budget: set both or neither")
        if self.activation_checkpointing == "budget" and self.trainer.micro_batch_size == "auto":
            raise ValueError(
                "trainer.micro_batch_size=auto and activation_checkpointing=budget each follow the other: "
                "give a number, or another mode"
            )
        if self.augment.is_paired and self.global_batch_size % 2:
            raise ValueError("global_batch_size must be even where mixup or cutmix is on: samples are mixed in pairs")
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.tag
