"""Build AdamW with groups by weight decay and by layer, and do an engine's updates with it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gcvit.config.schema import OptimConfig
from gcvit.optim.clip_grad import StepResult, clip_and_step, global_norm
from gcvit.optim.loss_scaler import LossScale

MODEL, EXP_AVG, EXP_AVG_SQ = "model", "exp_avg", "exp_avg_sq"
BIAS_TABLE = "bias_table"


@dataclass(frozen=True)
class Counters:
    """Hold the counters of an engine, which a checkpoint stores beside its tensors."""

    updates: int = 0  # applied by AdamW: steps minus refused updates
    loss_scale: float = 2.0**16  # of fp16: doubled after 2000 applied updates, halved after a refused one
    loss_scale_updates: int = 0  # applied updates since it last changed


class Updater:
    """Update what this rank holds: AdamW, clipping, the loss scale of fp16 and the counters of an engine.

    Gradients are read from `held[name].grad`. With fp16 they are multiplied by the loss scale.

    Args:
        held: This rank's fp32 tensors by parameter name, whole or in part, on the device or on the host.
        shapes: The shapes of the whole parameters.
        layers: See `build_adamw`.
        group: The ranks that hold the other parts; None if every rank holds whole parameters.
        keeps_gradients: Set gradients to zero instead of None, because their memory is held for the whole run.
    """

    def __init__(
        self,
        held: Mapping[str, Tensor],
        shapes: Mapping[str, torch.Size],
        layers: Mapping[str, int],
        optim: OptimConfig,
        device: torch.device,
        *,
        fp16: bool,
        group: dist.ProcessGroup | None = None,
        keeps_gradients: bool = False,
    ):
        self._held = held
        parameters = ((name, tuple(shapes[name]), tensor) for name, tensor in held.items())
        self._optimizer = build_adamw(parameters, optim, layers)
        create_moments(self._optimizer)
        self._clip_norm = optim.clip_norm
        self._device = device
        self._group = group
        self._keeps_gradients = keeps_gradients
        self._loss_scale = LossScale(device) if fp16 else None

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss to call backward on, multiplied by the loss scale in fp16."""
        return loss if self._loss_scale is None else loss * self._loss_scale.value

    def step(self, lr: float, *, head_only: bool = False) -> StepResult:
        """Clip, update unless the gradient is not finite, and drop the gradients."""
        grads = [tensor.grad for tensor in self._held.values() if tensor.grad is not None]
        norm = global_norm(grads)
        if self._group is not None:
            norm = self._over_ranks(norm)
        scale = None if self._loss_scale is None else self._loss_scale.value.to(norm.device)
        set_lr(self._optimizer, lr, head_only=head_only)
        result = clip_and_step(self._optimizer, grads, norm, self._clip_norm, scale)
        self._optimizer.zero_grad(set_to_none=not self._keeps_gradients)
        result = StepResult(result.grad_norm.to(self._device), result.applied.to(self._device))
        if self._loss_scale is not None:
            self._loss_scale.update(result.applied)
        return result

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a checkpoint, by kind and parameter name."""
        state = self._optimizer.state
        moments = {kind: {n: state[tensor][kind] for n, tensor in self._held.items()} for kind in (EXP_AVG, EXP_AVG_SQ)}
        return {MODEL: dict(self._held), **moments}

    def counters(self) -> Counters:
        updates = int(next(iter(self._optimizer.state.values()))["step"].item())
        return Counters(updates) if self._loss_scale is None else Counters(updates, *self._loss_scale.get())

    def set_counters(self, counters: Counters) -> None:
        for state in self._optimizer.state.values():
            state["step"].fill_(counters.updates)
        if self._loss_scale is not None:
            self._loss_scale.set(counters.loss_scale, counters.loss_scale_updates)

    def _over_ranks(self, norm: Tensor) -> Tensor:
        """Compute the norm over the group's ranks, summed in their order: all replicas get the same bits."""
        assert self._group is not None
        norms = torch.empty(self._group.size(), dtype=norm.dtype, device=self._device)
        dist.all_gather_into_tensor(norms, norm.view(1).to(self._device), group=self._group)
        return torch.linalg.vector_norm(norms).to(norm.device)


def decays(name: str, shape: Iterable[int], *, decay_bias_tables: bool) -> bool:
    """Return whether weight decay applies to a parameter: to matrices and convolutions, not to vectors and biases.

    Relative-position bias tables are matrices that serve as biases. The published runs decay them, because their
    exemption names a parameter that does not exist. timm does not decay them. So it is an option.
    """
    if name.endswith(BIAS_TABLE):
        return decay_bias_tables
    return len(tuple(shape)) > 1 and not name.endswith(".bias")


class Group(NamedTuple):
    """Hold the settings that the parameters of one AdamW group share."""

    lr_scale: float
    """The factor on the schedule's learning rate."""
    is_head: bool
    """Whether it is updated while the backbone is frozen. Always True if the backbone is never frozen."""
    decays: bool


def find_group(name: str, shape: tuple[int, ...], optim: OptimConfig, layers: Mapping[str, int]) -> Group:
    """Find the group of a parameter by its name and whole shape. For `layers` see `build_adamw`."""
    head = max(layers.values())
    return Group(
        lr_scale=(optim.layer_decay or 1.0) ** (head - layers[name]),
        is_head=optim.frozen_backbone is None or layers[name] == head,
        decays=decays(name, shape, decay_bias_tables=optim.decay_bias_tables),
    )


def build_adamw(
    parameters: Iterable[tuple[str, tuple[int, ...], torch.Tensor]], optim: OptimConfig, layers: Mapping[str, int]
) -> torch.optim.AdamW:
    """Build a fused AdamW. `set_lr` sets the learning rate at every step.

    Args:
        parameters: (name, whole shape, tensor) of each parameter. The tensor may be any shard of it, stored flat: the
            whole shape decides about weight decay.
        layers: The depth of each parameter of the model, the head being the deepest. A layer's learning rate is
            `optim.layer_decay` of the next one's (Bao et al., BEiT, 2021).
    """
    groups: dict[Group, list[torch.Tensor]] = {}
    for name, shape, tensor in parameters:
        groups.setdefault(find_group(name, shape, optim, layers), []).append(tensor)
    return torch.optim.AdamW(
        [
            {
                "params": groups[group],
                "weight_decay": optim.weight_decay if group.decays else 0.0,
                "lr_scale": group.lr_scale,
                "is_head": group.is_head,
            }
            for group in sorted(groups, reverse=True)
        ],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )


def create_moments(optimizer: torch.optim.AdamW) -> None:
    """Create zero moments and step counters at once, so that a checkpoint can be read before the first step."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            create_moment(optimizer, p)


def create_moment(optimizer: torch.optim.AdamW, p: torch.Tensor) -> None:
    """Create the state of one tensor, as the fused AdamW would at its first step."""
    optimizer.state[p] = {
        "step": torch.zeros((), dtype=torch.float32, device=p.device),
        "exp_avg": torch.zeros_like(p),
        "exp_avg_sq": torch.zeros_like(p),
    }


def set_lr(optimizer: torch.optim.Optimizer, lr: float, *, head_only: bool = False) -> None:
    """Set the learning rate of each group by its factor. With `head_only` it is 0 for all but the head."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"] if group["is_head"] or not head_only else 0.0
