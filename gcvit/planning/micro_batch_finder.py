"""Measure the largest micro-batch that fits, at the start of a run: `trainer.micro_batch_size=auto`.

Each rank measures without collectives: a rank that ran out of memory within one would leave the others waiting. Then
all ranks use the smallest answer. During the trial the memory that the engine will hold beside the model's activations
is allocated; `gcvit.planning.memory_predictor` predicts it.
"""

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from gcvit.config.schema import Config
from gcvit.data.batch_plan import BatchPlan
from gcvit.errors import UserError
from gcvit.model.kernels import serve_device
from gcvit.optim.loss import soft_target_loss
from gcvit.parallel.activation_budget import Compute
from gcvit.parallel.build import DTYPES
from gcvit.planning.memory_predictor import Forecast, with_micro_batch
from gcvit.runtime.distributed import World

_DECISIVE = ("global_batch_size", "engine", "fsdp", "zero", "precision", "activation_checkpointing")
"""The parts of a config that decide how much fits, beside the model, which a checkpoint fixes."""
_MARGIN = 0.05  # of a GPU's memory, for NCCL's buffers and the gaps that many steps leave


def resolve_micro_batch(config: Config, world: World, trained: Mapping[str, Any] | None, notices: list[str]) -> Config:
    """Replace "auto" by a number, the same on all ranks, and add its origin to `notices`. Every rank calls it.

    `trained` is the info of the checkpoint to resume from. If as many ranks resume in the same way, they keep its
    number, since the number decides where drop path falls.

    Raises:
        UserError: Not even a single image fits.
    """
    if config.trainer.micro_batch_size != "auto":
        return config
    before, now = (trained or {}).get("config", {}), config.model_dump(mode="json")
    is_same = trained is not None and trained["world_size"] == world.size
    if is_same and all(before[name] == now[name] for name in _DECISIVE):
        size = before["trainer"]["micro_batch_size"]
        notices.append(f"trainer.micro_batch_size=auto: {size or 'the whole share'}, as the checkpoint had it")
        return with_micro_batch(config, size)
    trial = Trial(config, world)
    size = min(world.gather(find_largest(BatchPlan.from_config(config, world.size, None), trial.fits)))
    trial.end()
    if not size:
        raise UserError(
            "not even the smallest micro-batch fits",
            got="trainer.micro_batch_size=auto",
            hint="see what does: --plan --gpus N --gpu NAME",
        )
    found = BatchPlan.from_config(config, world.size, size)
    notices.append(
        f"trainer.micro_batch_size=auto: {size} of {found.largest_share} images fit at once, "
        f"{found.num_micro_steps} micro-step(s)"
    )
    return with_micro_batch(config, size)


def find_largest(batch_plan: BatchPlan, fits: Callable[[int], bool]) -> int:
    """Find the largest micro-batch that `fits`, of those that divide the largest share evenly.

    It tries as few as it can: a micro-batch that is too large takes time to find out.

    Returns:
        Samples of the micro-batch; 0 if none fits.
    """
    most_steps = batch_plan.largest_share // batch_plan.unit
    enough = 1
    while not fits(batch_plan.even_micro_batch(enough)):
        if enough == most_steps:
            return 0
        enough = min(2 * enough, most_steps)
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        if fits(batch_plan.even_micro_batch(middle)):
            enough = middle
        else:
            too_few = middle
    return batch_plan.even_micro_batch(enough)


class Trial:
    """Run micro-batches forward and backward on this rank's device, beside the memory that its engine would hold."""

    def __init__(self, config: Config, world: World):
        self._config, self._world, self._on_gpu = config, world, world.device.type == "cuda"
        self._compute = Compute(world.device, DTYPES[config.precision], autocast=config.engine == "ddp")
        runs_triton = self._on_gpu and serve_device(world.device)
        self._forecast = Forecast(config, on_gpu=self._on_gpu, runs_triton=runs_triton)

    def fits(self, num_images: int) -> bool:
        self._clean_up()
        try:
            self._step(num_images)
        except torch.OutOfMemoryError:
            return False
        return True

    def end(self) -> None:
        self._clean_up()

    def _step(self, num_images: int) -> None:
        config, compute, device = self._config, self._compute, self._world.device
        memory = self._forecast.predict(config, self._world.size, num_images)
        model = self._forecast.recomputing(config, num_images).to(compute.weights_dtype).to_empty(device=device).train()
        weights = sum(p.nbytes for p in model.parameters())
        margin = _MARGIN * torch.cuda.mem_get_info(device)[1] if self._on_gpu else 0
        others = memory.peak - memory.at_peak["activations"] - weights + margin
        _others = torch.empty(max(0, int(others)), dtype=torch.uint8, device=device)
        for p in model.parameters():
            nn.init.constant_(p, 0.01)
            p.register_post_accumulate_grad_hook(_forget)
        images = torch.full((num_images, *model.input_size), 0.5, device=device)
        targets = torch.zeros(num_images, config.model.num_classes, device=device)
        # Drop path draws random numbers, which must not change those of the run.
        with torch.random.fork_rng(devices=[device] if self._on_gpu else []):
            with compute.context():
                logits = model(images.to(compute.weights_dtype)).float()
            soft_target_loss(logits, targets).sum().backward()
        if self._on_gpu:
            torch.cuda.synchronize(device)

    def _clean_up(self) -> None:
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()


def _forget(p: torch.Tensor) -> None:
    p.grad = None
