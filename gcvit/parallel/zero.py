"""Train with engine zero: DeepSpeed ZeRO shards moments, gradients and parameters, by stages 1 to 3.

DeepSpeed flattens each parameter group and splits the flat fp32 master into equal parts, also in the middle of a
matrix. At stage 3 it flattens and splits each parameter. Either way a rank holds contiguous ranges of flattened
tensors. They are reached by private names of DeepSpeed 0.19.8 (pinned), which only this module uses, and tests compare
digests. DeepSpeed's own checkpoints are not used: they cannot be loaded at another world size.
"""

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module
from torch import Tensor

from gcvit.config.schema import OptimConfig, ZeroConfig
from gcvit.errors import UserError
from gcvit.model import GCViT
from gcvit.model.layers import Stem
from gcvit.optim.adamw import EXP_AVG, EXP_AVG_SQ, MODEL, Counters, build_adamw, create_moment, set_lr
from gcvit.optim.clip_grad import StepResult
from gcvit.optim.loss_scaler import LossScale
from gcvit.parallel.deepspeed_config import build_settings
from gcvit.parallel.deepspeed_patches import (
    prepare_environment,
    release_linear_weights,
    use_zero_optimizer_in_bf16,
)
from gcvit.parallel.engine import Fragment, Fragments
from gcvit.runtime.distributed import World


class ZeroEngine:
    """Implement `Engine` with DeepSpeed.

    `module` is on the meta device. Its parameters are undefined until `fragments` are filled.
    """

    def __init__(
        self,
        module: GCViT,
        optim: OptimConfig,
        zero: ZeroConfig,
        world: World,
        *,
        global_batch_size: int,
        num_micro_steps: int,
        dtype: torch.dtype,
    ):
        if dtype == torch.float16 and not get_accelerator().is_fp16_supported():
            raise UserError(
                f"DeepSpeed does not compute in fp16 on this {world.device.type}",
                got="precision=fp16, engine=zero",
                hint="set precision=bf16, or use engine=ddp or engine=fsdp",
            )
        prepare_environment(world.device.type)
        deepspeed.init_distributed(dist_backend=None, verbose=False)
        settings = build_settings(optim, zero, module, num_micro_steps, dtype)
        check_settings(settings, world.device.type)
        shapes = {name: p.shape for name, p in module.named_parameters()}
        module.to(dtype)  # the masters stay fp32
        if zero.stage == 3:
            release_linear_weights(module)
            _materialize_in_parts(module, world.device, settings)
            _gather_by_parts(module)
        else:
            module.to_empty(device=world.device)
        module.init_buffers()
        parameters = ((name, tuple(shapes[name]), p) for name, p in module.named_parameters())
        optimizer = build_adamw(parameters, optim, module.find_layers())
        with use_zero_optimizer_in_bf16():
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self.module = module
        self._zero = self._engine.optimizer
        self._stage = zero.stage
        self._shapes = shapes
        self.world = world
        # DeepSpeed divides by the number of micro-steps, and at stage 3 by that of ranks.
        self._loss_factor = num_micro_steps * (world.size if zero.stage == 3 else 1) / global_batch_size
        self._num_micro_steps, self._micro_step = num_micro_steps, 0
        self._dtype = dtype
        # On the host: DeepSpeed reads it there, and has waited for the device by then.
        self._loss_scale = LossScale(torch.device("cpu")) if dtype == torch.float16 else None
        self._follow_loss_scale()
        for flat in self._flat_masters():
            create_moment(self._zero.optimizer, flat)
        if zero.stage != 3:
            self._zero._lazy_init_hp_params_optimizer_state()  # link the moments to the parameters' ranges

    def __call__(self, images: Tensor) -> Tensor:
        return self._engine(images.to(self._dtype)).float()

    def backward(self, loss_sum: Tensor) -> None:
        self._engine.backward(loss_sum * self._loss_factor)
        self._micro_step += 1
        if self._micro_step < self._num_micro_steps:
            self._engine.step()  # it only counts: DeepSpeed requires the call after every micro-step

    def step(self, lr: float, *, head_only: bool = False) -> StepResult:
        """Have DeepSpeed clip, refuse non-finite gradients (which waits for the device) and update."""
        assert self._micro_step == self._num_micro_steps, f"step after {self._micro_step} micro-steps"
        set_lr(self._zero.optimizer, lr, head_only=head_only)
        self._engine.step()
        self._micro_step = 0
        norm = torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float32, device=self.world.device)
        applied = torch.tensor(0.0 if self._zero.overflow else 1.0)
        if self._zero.overflow and self._stage != 3:
            # With offloading DeepSpeed would add the next gradients to the refused ones.
            self._zero.averaged_gradients = dict.fromkeys(self._zero.averaged_gradients)
        if self._loss_scale is not None:
            self._loss_scale.update(applied)
            self._follow_loss_scale()
        return StepResult(norm, applied.to(self.world.device))

    def fragments(self) -> dict[str, Fragments]:
        ranges = list(self._ranges())
        states = self._zero.optimizer.state
        return {
            MODEL: {name: Fragment(flat.detach()[cut], start, shape) for name, flat, cut, start, shape in ranges},
            **{
                kind: {
                    name: Fragment(states[flat][kind][cut], start, shape) for name, flat, cut, start, shape in ranges
                }
                for kind in (EXP_AVG, EXP_AVG_SQ)
            },
        }

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the fp32 masters into the weights that the model computes with, and gather them."""
        if self._stage != 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def counters(self) -> Counters:
        updates = int(self._zero.optimizer.state[self._flat_masters()[0]]["step"].item())
        return Counters(updates) if self._loss_scale is None else Counters(updates, *self._loss_scale.get())

    def set_counters(self, counters: Counters) -> None:
        for flat in self._flat_masters():
            self._zero.optimizer.state[flat]["step"].fill_(counters.updates)
        if self._loss_scale is not None:
            self._loss_scale.set(counters.loss_scale, counters.loss_scale_updates)
            self._follow_loss_scale()

    def _follow_loss_scale(self) -> None:
        """Set DeepSpeed's loss scale, which is constant by itself, to ours."""
        if self._loss_scale is not None:
            self._zero.loss_scaler.cur_scale = self._loss_scale.value.item()

    def _flat_masters(self) -> list[Tensor]:
        return (
            self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups
        )

    def _ranges(self) -> Iterator[tuple[str, Tensor, slice, int, torch.Size]]:
        """Yield (name, flat master, slice, start in the flattened parameter, whole shape) of what this rank holds."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        for group, flat in enumerate(self._flat_masters()):
            if self._stage != 3:
                for p in self._zero.bit16_groups[group]:
                    if (held := p._hp_mapping) is not None:
                        address = held.hp_fragment_address
                        cut = slice(address.start, address.start + address.numel)
                        name = names[id(p)]
                        yield name, flat, cut, held.lp_fragment_address.start, self._shapes[name]
                continue
            offset = 0
            for p in self._zero.fp16_groups[group]:
                per_rank = p.partition_numel()  # the last rank's part may end in padding
                start = self.world.rank * per_rank
                numel = min(per_rank, p.ds_numel - start)
                if numel > 0:
                    name = names[id(p)]
                    yield name, flat, slice(offset, offset + numel), start, self._shapes[name]
                offset += per_rank


def check_settings(settings: dict[str, Any], device_type: str) -> None:
    """Have DeepSpeed validate its settings before anything is built.

    Raises:
        UserError: with DeepSpeed's message.
    """
    quantized = [key for key, value in settings["zero_optimization"].items() if "quantized" in key and value]
    if quantized and device_type != "cuda":
        raise UserError("ZeRO++ quantizes on a GPU only", got=", ".join(quantized), hint="remove it from zero.extra")
    try:
        deepspeed.DeepSpeedConfig(settings)
    except (ValueError, TypeError, AttributeError, AssertionError, DeepSpeedConfigError) as error:
        raise UserError("DeepSpeed refuses zero.extra", got=error, hint="correct or remove what it names") from error


def _gather_by_parts(module: GCViT) -> None:
    """Gather each part of the model in one message instead of one message per layer.

    The stem is left out: its input has no gradient, so DeepSpeed does not notice the end of its backward pass.
    """
    for name in module.cut_points():
        part = module.get_submodule(name)
        if not isinstance(part, Stem):
            set_z3_leaf_module(part, True)


def _materialize_in_parts(module: GCViT, device: torch.device, settings: dict[str, Any]) -> None:
    """Allocate and shard one submodule after another, so that no rank ever holds the whole model."""
    for part in reversed(list(module.modules())):  # children before their parents: DeepSpeed skips what is sharded
        if next(part.parameters(recurse=False), None) is not None:
            part.to_empty(device=device, recurse=False)
            deepspeed.zero.Init(module=part, config_dict_or_path=settings)
