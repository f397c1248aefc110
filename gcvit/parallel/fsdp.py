"""Train with engine fsdp: PyTorch's FSDP2 shards parameters, gradients, moments and EMA over the ranks.

FSDP2 shards every parameter by rows (dimension 0, as `torch.chunk` does), so a rank holds a contiguous range of the
flattened tensor. The optimizer updates these local tensors directly: AdamW is elementwise, and plain tensors avoid
the overhead of dispatching each operation through DTensor.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gcvit.config.schema import FsdpConfig, OptimConfig
from gcvit.errors import UserError
from gcvit.model import GCViT
from gcvit.optim.adamw import Counters, Updater
from gcvit.optim.clip_grad import StepResult
from gcvit.parallel.engine import Fragment, Fragments
from gcvit.runtime.distributed import World


class FsdpEngine:
    """Implement `Engine` with FSDP2.

    `module` is on the meta device. Its parameters are undefined until `fragments` are filled.
    """

    def __init__(
        self,
        module: GCViT,
        optim: OptimConfig,
        fsdp: FsdpConfig,
        world: World,
        *,
        global_batch_size: int,
        num_micro_steps: int,
        dtype: torch.dtype,
    ):
        shard_size = fsdp.shard_size or world.size
        check_shards(module, shard_size, world.size)
        self._num_replicas, self._shard_size = world.size // shard_size, shard_size
        self._replica, self._shard_rank = divmod(world.rank, shard_size)
        # Ranks of a node are neighbours: parameters are gathered within the node if shard_size is at most its size.
        shape = (self._num_replicas, shard_size) if self._num_replicas > 1 else (shard_size,)
        mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=torch.bfloat16 if fsdp.reduce_dtype == "bf16" else torch.float32,
        )
        pinned = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
        offload = pinned if fsdp.cpu_offload else OffloadPolicy()
        common: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
        units = find_units(module, fsdp.unit_parameters)
        for unit in units:
            # Backward begins with the last unit, which would be gathered again at once.
            reshard = fsdp.reshard_after_forward and unit is not units[-1]
            fully_shard(unit, reshard_after_forward=reshard, **common)
        fully_shard(module, **common)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                # Gradients are summed over ranks, and the loss is divided instead, which costs nothing.
                part.set_force_sum_reduction_for_comms(True)
                part.set_gradient_divide_factor(1.0)
        module.to_empty(device="cpu" if fsdp.cpu_offload else world.device)
        module.init_buffers()
        self.module = module
        self.world = world
        self._parameters = dict(module.named_parameters())
        # A rank past the last row holds nothing of a small parameter.
        self._held = {name: shard for name, p in self._parameters.items() if (shard := _local(p)).numel()}
        self._updater = Updater(
            self._held,
            {name: p.shape for name, p in self._parameters.items()},
            module.find_layers(),
            optim,
            world.device,
            fp16=dtype == torch.float16,
            group=mesh.get_group("shard") if shard_size > 1 else None,
        )
        self._loss_factor = 1 / global_batch_size
        self._num_micro_steps = num_micro_steps
        self._begin_micro_step(0)

    def __call__(self, images: Tensor) -> Tensor:
        return self.module(images).float()

    def backward(self, loss_sum: Tensor) -> None:
        self._updater.scaled(loss_sum * self._loss_factor).backward()
        self._begin_micro_step(self._micro_step + 1)

    def step(self, lr: float, *, head_only: bool = False) -> StepResult:
        assert self._micro_step == self._num_micro_steps, f"step after {self._micro_step} micro-steps"
        for name, shard in self._held.items():
            shard.grad = _local(self._parameters[name].grad)
        self.module.zero_grad()
        result = self._updater.step(lr, head_only=head_only)
        self._begin_micro_step(0)
        return result

    def fragments(self) -> dict[str, Fragments]:
        return {
            kind: {name: self._fragment(name, tensor) for name, tensor in tensors.items()}
            for kind, tensors in self._updater.tensors().items()
        }

    def refresh(self) -> None:
        """Free gathered copies: the last unit and the outermost group keep theirs after forward."""
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def counters(self) -> Counters:
        return self._updater.counters()

    def set_counters(self, counters: Counters) -> None:
        self._updater.set_counters(counters)

    def _fragment(self, name: str, shard: Tensor) -> Fragment:
        shape = self._parameters[name].shape
        rows_per_rank = -(-shape[0] // self._shard_size)
        start = self._shard_rank * rows_per_rank * (shape.numel() // shape[0])
        return Fragment(shard, start, shape, replica=self._replica, num_replicas=self._num_replicas)

    def _begin_micro_step(self, micro_step: int) -> None:
        self._micro_step = micro_step
        self.module.set_requires_gradient_sync(micro_step == self._num_micro_steps - 1)  # type: ignore[operator]


def check_shards(module: GCViT, shard_size: int, world_size: int) -> None:
    """Check that `shard_size` ranks can share a copy of the model.

    Raises:
        UserError: if they cannot.
    """
    if world_size % shard_size:
        fitting = max(size for size in range(1, shard_size) if world_size % size == 0)
        raise UserError(
            "fsdp.shard_size does not divide the processes into equal copies of the model",
            got=shard_size,
            expected=f"a divisor of {world_size} processes",
            hint=f"set fsdp.shard_size={fitting}, or null for one copy over all",
        )
    last = shard_size - 1
    if not any(last * -(-p.shape[0] // shard_size) < p.shape[0] for p in module.parameters()):
        raise UserError(
            "engine=fsdp shards parameters by rows, and there are too few for all processes",
            got=f"{shard_size} processes to share a copy",
            hint="start fewer, set a smaller fsdp.shard_size, or use engine=ddp: the model is small",
        )


def find_units(module: GCViT, num_parameters: int) -> list[list[nn.Module]]:
    """Group neighbouring cut points to units of at least `num_parameters`: a small unit costs a message, not bytes."""
    units: list[list[nn.Module]] = []
    unit: list[nn.Module] = []
    for name in module.cut_points():
        unit.append(module.get_submodule(name))
        if sum(p.numel() for part in unit for p in part.parameters()) >= num_parameters:
            units.append(unit)
            unit = []
    # The rest is too small for a unit: it joins the last one.
    return [*units[:-1], units[-1] + unit] if units else [unit]


def _local(tensor: Tensor | None) -> Tensor:
    """Return this rank's rows of a DTensor, flat, as a view of its memory."""
    assert isinstance(tensor, DTensor)
    local: Tensor = tensor.to_local()
    return local.detach().view(-1)
