"""Format a plan as text and tables for a terminal."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from gcvit.config.schema import Config
from gcvit.data.download import is_remote
from gcvit.data.source import open_sources
from gcvit.errors import UserError
from gcvit.model.flops import TRAINING_PASSES
from gcvit.optim.lr_schedule import to_samples
from gcvit.planning.memory_predictor import GPUS_PER_NODE, engine_name
from gcvit.planning.memory_simulator import KINDS
from gcvit.planning.plan import ASSUMED_GPU, ROOM, Plan, make_plan
from gcvit.planning.scaling import find_obstacle

IMAGES_PER_CORE = 410
"""Decoded, cropped and augmented in a second: `benchmarks/RESULTS.md`, "The loader"."""
_GB = 1e9


def print_plan(
    config: Config, notices: Sequence[str], *, num_gpus: int | None, gpu: str | None, mfu: float | None
) -> None:
    """Print the plan of `train.py --plan`; the arguments are its flags.

    Raises:
        UserError: As `make_plan` and `open_sources`.
    """
    folder = config.data.dir
    if folder is not None and not is_remote(folder) and not Path(folder).exists():
        hint = "check --data_dir, or plan for ImageNet-1K with data.dir=null"
        raise UserError("the data directory is no directory", got=f"{folder} (missing)", hint=hint)
    sources = None if folder is None else open_sources(config.data, config.model.num_classes)
    assumed = gpu is None and not torch.cuda.is_available()
    remarks = [f"there is no GPU here: {ASSUMED_GPU} is assumed, see --gpu and --gpus"] if assumed else []
    print(describe(make_plan(config, sources, num_gpus=num_gpus, gpu=gpu, mfu=mfu), [*notices, *remarks]), flush=True)


def describe(plan: Plan, notices: Sequence[str] = ()) -> str:
    """Format the whole plan; `notices` are the warnings of loading the config."""
    config = plan.config
    side, where = config.model.img_size, f"{plan.num_gpus} x {plan.device.name}"
    head = (
        f"{config.tag}: {config.model.name} at {side} x {side}, {plan.num_parameters / 1e6:,.1f} M parameters, "
        f"{config.precision}, by {engine_name(config, plan.num_gpus)} on {where}"
    )
    sections = {
        "recipe": describe_recipe(plan),
        "memory": describe_memory(plan),
        "speed": describe_speed(plan),
        "data": describe_data(plan),
        "checkpoints": describe_checkpoints(plan),
    }
    lines = [head]
    for title, sentences in sections.items():
        lines += ["", title, *(f"  {sentence}".rstrip() for sentence in sentences)]
    remarks = [*notices, *find_warnings(plan)]
    return "\n".join([*lines, *([""] if remarks else []), *(f"note: {remark}" for remark in remarks)])


def describe_recipe(plan: Plan) -> Iterator[str]:
    config, schedule = plan.config, plan.schedule
    epochs = plan.num_trained / plan.data.num_samples
    parts = [f"{config.schedule.cosine} of cosine"]
    if schedule.warmup_steps:
        parts[0] += f", of which {config.schedule.warmup} warm up"
    if schedule.cooldown_steps:
        parts.append(f"{config.schedule.cooldown} of cooldown")
    yield (f"{_figure(epochs)} epochs run ({', and '.join(parts)}):")
    yield f"{schedule.total_steps:,} updates of {config.global_batch_size:,} images, in all {plan.num_trained:,}"
    yield f"learning rate up to {schedule.peak_lr:g}, {schedule.min_lr:g} at the end; seed {config.seed}"
    if config.optim.frozen_backbone:
        yield f"the head alone is trained for {config.optim.frozen_backbone}"
    if config.ema:
        length = {"global_batch_size": config.global_batch_size, "samples_per_epoch": plan.data.num_samples}
        half_life = to_samples(config.ema.half_life, **length)
        per_update = 0.5 ** (config.global_batch_size / half_life)
        yield f"EMA half-life {half_life / plan.data.num_samples:,.2g} epochs (decay {per_update:.6g} an update)"
    else:
        yield "no EMA"
    decay = f"{config.optim.weight_decay:g} on the others"
    yield f"{plan.num_undecayed} of {plan.num_tensors} tensors without decay, {decay}"
    share = config.global_batch_size / plan.num_gpus
    batches = plan.batch_plan
    yield (
        f"{_figure(share)} images a GPU and update, in {batches.num_micro_steps} micro-step(s) of at most "
        f"{batches.capacity}: these alone follow the number of GPUs"
    )


def describe_memory(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    unit, size = ("GB", 1e9) if memory.peak > 1e9 else ("MB", 1e6)
    yield _row((f"{unit} of each GPU", ""), (*KINDS, "all"))
    yield _row(("between steps", ""), _amounts(memory.held, size))
    yield _row(("at the peak", ""), _amounts(memory.at_peak, size))
    limit = ROOM * plan.device.memory_bytes / _GB
    yield f"the peak is in {memory.moment}; {limit:,.1f} GB may be taken, {ROOM:.0%} of {plan.device.name}'s"
    if memory.host:
        yield f"and {memory.host / _GB:,.2f} GB of the host's for each GPU, to which states are offloaded"
    yield ""
    micro_batch = plan.batch_plan.capacity
    yield f"at the peak with {micro_batch} images, and how many images would fit, by engine and recomputing:"
    yield _row(("engine", "recomputing"), (*KINDS, "all", "would fit"))
    for cell in plan.cells:
        yield _row((cell.engine, cell.mode), (*_amounts(cell.memory.at_peak, size), f"{cell.largest:,}"))


def _amounts(kinds: Mapping[str, int], size: float) -> list[str]:
    return [f"{number / size:,.2f}" for number in (*(kinds.get(kind, 0) for kind in KINDS), sum(kinds.values()))]


def _row(names: Sequence[str], cells: Sequence[str]) -> str:
    """Format a row of the tables of memory, with `KINDS` and further columns."""
    widths = (*[12 for _ in KINDS], 9, 10)
    columns = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False)]
    return f"{names[0]:14}{names[1]:12}" + "".join(columns)


def describe_speed(plan: Plan) -> Iterator[str]:
    peak = plan.device.peaks[plan.config.precision]
    trained = TRAINING_PASSES * plan.forward_flops
    recomputing = f", {plan.recomputing:.2f} times that with recomputing" if plan.recomputing > 1.001 else ""
    yield (
        f"an image takes {trained / 1e9:,.1f} GFLOP to train ({TRAINING_PASSES} x {plan.forward_flops / 1e9:,.2f})"
        + recomputing
    )
    yield (
        f"{plan.images_per_second:,.0f} images/s, {plan.images_per_second / plan.num_gpus:,.0f} on each GPU, if it "
        f"computes at {plan.mfu:.0%} of its {peak / 1e12:,.0f} TFLOP/s"
    )
    yield "(assumed: --mfu SHARE has another share; no GPU waits for data or for another)"
    if plan.num_gpus > 1:
        yield from describe_scaling(plan)
    gpu_hours = f"{_figure(plan.hours * plan.num_gpus)} GPU hours"
    yield f"{_duration(plan.hours)}, {gpu_hours}, {plan.num_evaluations} evaluations included"


def describe_scaling(plan: Plan) -> Iterator[str]:
    if (scaling := plan.scaling) is None:
        config = plan.config
        shard_size = config.fsdp.shard_size if config.fsdp else None
        obstacle = find_obstacle(engine_name(config, plan.num_gpus), plan.device.name, plan.num_gpus, shard_size)
        yield f"scaling efficiency not predicted: {obstacle}"
        return
    links, num_nodes = scaling.links, math.ceil(plan.num_gpus / GPUS_PER_NODE)
    network = f", network {links.network / _GB:g} GB/s a GPU" if num_nodes > 1 else ""
    yield (
        f"scaling efficiency {scaling.efficiency:.1%} on {plan.num_gpus} GPUs, {num_nodes} node(s): "
        f"{scaling.efficiency * plan.images_per_second:,.0f} images/s"
    )
    yield f"(predicted, not measured; assumed: NVLink {links.nvlink / _GB:g} GB/s{network}, see docs/scaling.md)"


def describe_data(plan: Plan) -> Iterator[str]:
    data, config = plan.data, plan.config
    yield f"{data.name}: {data.num_samples:,} images of {data.bytes_per_image / 1e3:,.0f} KB"
    rate = plan.images_per_second
    num_nodes = math.ceil(plan.num_gpus / GPUS_PER_NODE)
    yield (
        f"to read: {rate * data.bytes_per_image / 1e6:,.0f} MB/s in all, "
        f"{rate * data.bytes_per_image / num_nodes / 1e6:,.0f} on each of {num_nodes} node(s)"
    )
    readers = _count_readers(plan)
    if data.num_shards is None:
        yield f"shards: not known; from {readers:,} on, each reader has one of its own"
    else:
        verdict = "one or more of its own for each" if data.num_shards >= readers else "readers share them"
        yield f"shards or folders: {data.num_shards:,} for {readers:,} reader(s), {verdict}"
    yield (
        f"to decode: {rate / IMAGES_PER_CORE / plan.num_gpus:,.1f} cores a GPU at {IMAGES_PER_CORE} images/s each; "
        f"{config.data.num_workers} worker(s) a GPU, {readers:,} reader(s) in all"
    )
    yield f"{config.data.lanes:,} lanes: {'whole ones' if _has_whole_lanes(plan) else 'not whole ones'} for each GPU"


def describe_checkpoints(plan: Plan) -> Iterator[str]:
    keep, size = plan.config.trainer.keep_checkpoints, plan.checkpoint_bytes
    every = plan.config.trainer.save_every
    yield f"{_bytes(size)} each, every {every}; {keep} newest and the best: {_bytes((keep + 1) * size)}"


def find_warnings(plan: Plan) -> Iterator[str]:
    """Yield warnings about what works, but not well."""
    config, data = plan.config, plan.data
    if plan.batch_plan.has_empty_shares:
        yield f"{plan.num_gpus} GPUs for a global batch of {config.global_batch_size}: some have nothing to do"
    if not _has_whole_lanes(plan):
        yield (
            f"samples are read one by one: {plan.num_gpus} GPUs do not divide data.lanes={config.data.lanes}, "
            f"or these not the global batch"
        )
    if data.num_shards is not None and data.num_shards < plan.num_gpus:
        yield (
            f"{data.num_shards:,} shards for {plan.num_gpus} GPUs ({_count_readers(plan):,} readers): several read "
            "from one file at once, which a disk of one machine does slowly; shard the data into smaller ones"
        )
    cores = plan.images_per_second / IMAGES_PER_CORE / plan.num_gpus
    if cores > max(1, config.data.num_workers):
        yield (
            f"{cores:,.1f} cores a GPU are wanted for decoding, and data.num_workers={config.data.num_workers}: "
            "the GPUs would wait"
        )
    num_bytes = config.data.lanes * config.data.shuffle_chunks * config.data.chunk_bytes / plan.num_gpus
    if data.is_chunked and num_bytes > _GB:
        yield f"the shuffle buffer takes up to {num_bytes / _GB:,.1f} GB of the host's memory for each GPU"
    if config.model.drop_path_skips:
        yield "model.drop_path_skips=true: a step that skips images takes less than is predicted here"
    if config.compile:
        yield "compile=true: what the compiler fuses takes less than is predicted here"


def _has_whole_lanes(plan: Plan) -> bool:
    return plan.batch_plan.holds_whole_lanes(plan.config.data.lanes)


def _count_readers(plan: Plan) -> int:
    """Count the processes that read shards: the workers, or the training processes if there are none."""
    return plan.num_gpus * max(1, plan.config.data.num_workers)


def _figure(number: float) -> str:
    """Format with four digits, or all digits before the point."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def _bytes(number: float) -> str:
    return f"{number / _GB:,.2f} GB" if number > _GB else f"{number / 1e6:,.0f} MB"


def _duration(hours: float) -> str:
    if hours < 1 / 30:
        return f"{3600 * hours:,.3g} seconds"
    if hours < 2:
        return f"{60 * hours:,.3g} minutes"
    return f"{hours:,.1f} hours" if hours < 48 else f"{hours / 24:,.1f} days"
