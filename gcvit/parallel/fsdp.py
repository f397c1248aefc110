"""Engine fsdp: parameters, gradients, moments and EMA cut over the ranks by PyTorch's FSDP2.

FSDP2 cuts every parameter by rows (dimension 0, as `torch.chunk` does), so a rank holds a contiguous range of the
flattened tensor. The optimizer works on these local tensors directly: AdamW is elementwise, and plain tensors spare
the overhead of dispatching each operation through DTensor.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gcvit.config import FsdpConfig, OptimConfig
from gcvit.errors import UserError
from gcvit.model import GCViT
from gcvit.optim import build_adamw, clip_and_step, create_moments, global_norm
from gcvit.parallel.engine import EXP_AVG, EXP_AVG_SQ, MODEL, Counters, Fragment, Fragments, StepResult
from gcvit.parallel.world import World


class FsdpEngine:
    """See `engine.py`. `module` is on the meta device; its parameters are undefined until `fragments` are filled."""

    def __init__(
        self,
        module: GCViT,
        optim: OptimConfig,
        fsdp: FsdpConfig,
        world: World,
        *,
        global_batch_size: int,
        num_micro_steps: int,
        bf16: bool,
    ):
        last = world.size - 1
        if not any(last * -(-p.shape[0] // world.size) < p.shape[0] for p in module.parameters()):
            raise UserError(
                "engine=fsdp cuts parameters by rows, and there are too few for all processes",
                got=f"{world.size} processes",
                cure="start fewer, or take engine=ddp: the model is small",
            )
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
        for unit in _units(module, fsdp.unit_parameters):
            fully_shard(unit, mp_policy=policy, reshard_after_forward=fsdp.reshard_after_forward)
        fully_shard(module, mp_policy=policy)
        module.to_empty(device=world.device)
        module.init_buffers()
        self.module = module
        self.world = world
        self._parameters = dict(module.named_parameters())
        self._shards = {name: _local(p) for name, p in self._parameters.items()}
        # A rank past the last row holds nothing of a small parameter.
        self._held = {name: shard for name, shard in self._shards.items() if shard.numel()}
        self._optimizer = build_adamw(((n, tuple(self._parameters[n].shape), s) for n, s in self._held.items()), optim)
        create_moments(self._optimizer)
        self._clip_norm = optim.clip_norm
        self._loss_scale = world.size / global_batch_size  # FSDP2 averages over ranks
        self._num_micro_steps = num_micro_steps
        self._begin_micro_step(0)

    def __call__(self, images: Tensor) -> Tensor:
        return self.module(images).float()

    def backward(self, loss_sum: Tensor) -> None:
        (loss_sum * self._loss_scale).backward()
        self._begin_micro_step(self._micro_step + 1)

    def step(self, lr: float) -> StepResult:
        assert self._micro_step == self._num_micro_steps, f"step after {self._micro_step} micro-steps"
        for name, shard in self._held.items():
            shard.grad = _local(self._parameters[name].grad)
        grads = [shard.grad for shard in self._held.values() if shard.grad is not None]
        norm = global_norm(grads)
        if self.world.size > 1:
            squared = norm.square()
            dist.all_reduce(squared)
            norm = squared.sqrt()
        result = clip_and_step(self._optimizer, grads, norm, self._clip_norm, lr)
        self._optimizer.zero_grad()
        self.module.zero_grad()
        self._begin_micro_step(0)
        return result

    def fragments(self) -> dict[str, Fragments]:
        return {
            MODEL: {name: self._fragment(name, shard) for name, shard in self._held.items()},
            **{
                kind: {n: self._fragment(n, self._optimizer.state[s][kind]) for n, s in self._held.items()}
                for kind in (EXP_AVG, EXP_AVG_SQ)
            },
        }

    def refresh(self) -> None:
        """Forget gathered copies: the outermost group keeps its own after forward."""
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def counters(self) -> Counters:
        return Counters(updates=int(next(iter(self._optimizer.state.values()))["step"].item()))

    def set_counters(self, counters: Counters) -> None:
        for state in self._optimizer.state.values():
            state["step"].fill_(counters.updates)

    def _fragment(self, name: str, shard: Tensor) -> Fragment:
        shape = self._parameters[name].shape
        rows_per_rank = -(-shape[0] // self.world.size)
        return Fragment(shard, self.world.rank * rows_per_rank * (shape.numel() // shape[0]), shape)

    def _begin_micro_step(self, micro_step: int) -> None:
        self._micro_step = micro_step
        self.module.set_requires_gradient_sync(micro_step == self._num_micro_steps - 1)  # type: ignore[operator]


def _units(module: GCViT, num_parameters: int) -> list[list[nn.Module]]:
    """Neighbouring cut points in groups of at least so many parameters: small ones cost a message, not bytes."""
    units: list[list[nn.Module]] = [[]]
    for name in module.cut_points():
        if sum(p.numel() for part in units[-1] for p in part.parameters()) >= num_parameters:
            units.append([])
        units[-1].append(module.get_submodule(name))
    return units


def _local(tensor: Tensor | None) -> Tensor:
    """This rank's rows of a DTensor, flat, sharing its memory."""
    assert isinstance(tensor, DTensor)
    local: Tensor = tensor.to_local()
    return local.detach().view(-1)
