"""Engine zero: moments, gradients and parameters cut over the ranks by DeepSpeed ZeRO, stages 1 to 3.

DeepSpeed flattens each parameter group and cuts the flat fp32 master at equal places, in the middle of a matrix
where that falls so; at stage 3 it flattens and cuts each parameter for itself. Either way a rank holds contiguous
ranges of flattened tensors. Reaching them takes private names of DeepSpeed 0.19.8 (pinned): they stand here alone,
and the tests compare digests. DeepSpeed's own checkpoints are not used: they do not move between world sizes.
"""

import os
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from torch import Tensor

from gcvit.config import OptimConfig, ZeroConfig
from gcvit.errors import UserError
from gcvit.model import GCViT
from gcvit.optim import build_adamw, create_moment, set_lr
from gcvit.parallel.engine import EXP_AVG, EXP_AVG_SQ, MODEL, Counters, Fragment, Fragments, StepResult
from gcvit.parallel.world import World


class ZeroEngine:
    """See `engine.py`. `module` is on the meta device; its parameters are undefined until `fragments` are filled."""

    def __init__(
        self,
        module: GCViT,
        optim: OptimConfig,
        zero: ZeroConfig,
        world: World,
        *,
        global_batch_size: int,
        num_micro_steps: int,
        bf16: bool,
    ):
        if bf16 and zero.stage == 1 and num_micro_steps > 1:
            # With fp32 sums DeepSpeed takes another optimizer here, one that this engine does not know.
            raise UserError(
                "zero.stage=1 in bf16 sums the gradients of micro-steps in bf16",
                got=f"{num_micro_steps} micro-steps",
                cure="take zero.stage=2, which sums in fp32, or a larger trainer.micro_batch_size",
            )
        _prepare_environment(world)
        deepspeed.init_distributed(dist_backend=None, verbose=False)
        settings = _settings(optim, zero, num_micro_steps, bf16)
        shapes = {name: p.shape for name, p in module.named_parameters()}
        module.to(torch.bfloat16 if bf16 else torch.float32)  # the masters stay fp32
        if zero.stage == 3:
            _materialize_in_parts(module, world.device, settings)
        else:
            module.to_empty(device=world.device)
        module.init_buffers()
        optimizer = build_adamw(((n, tuple(shapes[n]), p) for n, p in module.named_parameters()), optim)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self.module = module
        self._zero = self._engine.optimizer
        self._stage = zero.stage
        self._shapes = shapes
        self.world = world
        # DeepSpeed averages over ranks and divides by the number of micro-steps.
        self._loss_scale = world.size * num_micro_steps / global_batch_size
        self._num_micro_steps, self._micro_step = num_micro_steps, 0
        self._dtype = torch.bfloat16 if bf16 else torch.float32
        for flat in self._flat_masters():
            create_moment(self._zero.optimizer, flat)
        if zero.stage != 3:
            self._zero._lazy_init_hp_params_optimizer_state()  # link the moments to the parameters' ranges

    def __call__(self, images: Tensor) -> Tensor:
        return self._engine(images.to(self._dtype)).float()

    def backward(self, loss_sum: Tensor) -> None:
        self._engine.backward(loss_sum * self._loss_scale)
        self._micro_step += 1
        if self._micro_step < self._num_micro_steps:
            self._engine.step()  # only counts: DeepSpeed wants it after every micro-step

    def step(self, lr: float) -> StepResult:
        """DeepSpeed clips, refuses non-finite gradients (which waits for the device) and updates."""
        assert self._micro_step == self._num_micro_steps, f"step after {self._micro_step} micro-steps"
        set_lr(self._zero.optimizer, lr)
        self._engine.step()
        self._micro_step = 0
        norm = torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float32, device=self.world.device)
        return StepResult(norm, torch.tensor(0.0 if self._zero.overflow else 1.0, device=self.world.device))

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
        return Counters(updates=int(self._zero.optimizer.state[self._flat_masters()[0]]["step"].item()))

    def set_counters(self, counters: Counters) -> None:
        for flat in self._flat_masters():
            self._zero.optimizer.state[flat]["step"].fill_(counters.updates)

    def _flat_masters(self) -> list[Tensor]:
        return (
            self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups
        )

    def _ranges(self) -> Iterator[tuple[str, Tensor, slice, int, torch.Size]]:
        """(name, flat master, slice of it, place in the flattened parameter, whole shape) of all that is held here."""
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


def _settings(optim: OptimConfig, zero: ZeroConfig, num_micro_steps: int, bf16: bool) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # nominal: samples are counted by the stream
        "gradient_accumulation_steps": num_micro_steps,
        "gradient_clipping": optim.clip_norm or 0.0,  # always written: DeepSpeed's default is 1.0
        "bf16": {"enabled": bf16},
        # By default gradients are summed in the compute precision, over micro-steps and over ranks.
        "communication_data_type": "fp32",
        **({"data_types": {"grad_accum_dtype": "fp32"}} if zero.stage > 1 else {}),
        "zero_optimization": {
            "stage": zero.stage,
            "contiguous_gradients": True,
            "overlap_comm": torch.cuda.is_available(),
            # DeepSpeed's default of 5e8 elements is many times a GC ViT.
            "reduce_bucket_size": 20_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        "steps_per_print": 2**31,
    }


def _materialize_in_parts(module: GCViT, device: torch.device, settings: dict[str, Any]) -> None:
    """Give each submodule memory and let stage 3 cut it at once, so that no rank ever holds the whole model."""
    for part in reversed(list(module.modules())):  # children before their parents: DeepSpeed skips what is cut
        if next(part.parameters(recurse=False), None) is not None:
            part.to_empty(device=device, recurse=False)
            deepspeed.zero.Init(module=part, config_dict_or_path=settings)


def _prepare_environment(world: World) -> None:
    """Spare the user what DeepSpeed would do at its start."""
    os.environ.setdefault("LOCAL_RANK", "0")  # it insists on it, for one plain process too
    if world.device.type == "cpu":
        # It would compile a shared-memory collective for half a minute, which gloo does without.
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False
