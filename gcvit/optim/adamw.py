"""AdamW in groups, by weight decay and by layer; clipping and stepping without a word to the host."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gcvit.config.schema import OptimConfig
from gcvit.optim.loss_scaler import LossScale

MODEL, EXP_AVG, EXP_AVG_SQ = "model", "exp_avg", "exp_avg_sq"
BIAS_TABLE = "bias_table"


@dataclass(frozen=True)
class StepResult:
    """What an update did, on the device."""

    grad_norm: Tensor  # [], before clipping
    applied: Tensor  # [], 1.0, or 0.0 where the gradient was not finite and nothing was changed


@dataclass(frozen=True)
class Counters:
    """What an engine counts beside its tensors; it survives in a checkpoint."""

    updates: int = 0  # applied by AdamW: steps less the refused ones
    loss_scale: float = 2.0**16  # of fp16, doubled after 2000 updates that it survived, halved after one it did not
    loss_scale_updates: int = 0  # updates since it last changed


class Updater:
    """The updates of an engine: AdamW over what this rank holds, clipping, the loss scale of fp16, and the counters.

    `held` are this rank's fp32 tensors by parameter name, whole or in part, on the device or on the host; `shapes`
    those of the wholes, `layers` as for `build_adamw`. `group` are the ranks that hold the other parts, None where
    all are held whole. Gradients are looked for in `held[name].grad`, times the loss scale where there is one;
    `keeps_gradients` is for those whose memory is held for the whole run, and needed again.
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
        """The loss as backward wants it."""
        return loss if self._loss_scale is None else loss * self._loss_scale.value

    def step(self, lr: float, *, head_only: bool = False) -> StepResult:
        """Clip, update or refuse, and forget the gradients."""
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
        """What a checkpoint holds, by kind and parameter name."""
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
        """The norm over the group's ranks, added up in their order: replicas in other groups get the same bits."""
        assert self._group is not None
        norms = torch.empty(self._group.size(), dtype=norm.dtype, device=self._device)
        dist.all_gather_into_tensor(norms, norm.view(1).to(self._device), group=self._group)
        return torch.linalg.vector_norm(norms).to(norm.device)


def decays(name: str, shape: Iterable[int], *, decay_bias_tables: bool) -> bool:
    """Whether a parameter decays: matrices and convolutions do, vectors and biases do not.

    Relative-position bias tables are matrices in form and biases in use: the published runs decay them (their
    exemption names a parameter that does not exist), timm does not, so it is a choice.
    """
    if name.endswith(BIAS_TABLE):
        return decay_bias_tables
    return len(tuple(shape)) > 1 and not name.endswith(".bias")


class Group(NamedTuple):
    """What parameters have in common that AdamW treats alike."""

    lr_scale: float
    """Factor on the schedule's learning rate."""
    is_head: bool
    """Always True where the head is never alone in moving."""
    decays: bool


def find_group(name: str, shape: tuple[int, ...], optim: OptimConfig, layers: Mapping[str, int]) -> Group:
    """The group of a parameter of this whole shape; `layers` as for `build_adamw`."""
    head = max(layers.values())
    return Group(
        lr_scale=(optim.layer_decay or 1.0) ** (head - layers[name]),
        is_head=optim.frozen_backbone is None or layers[name] == head,
        decays=decays(name, shape, decay_bias_tables=optim.decay_bias_tables),
    )


def build_adamw(
    parameters: Iterable[tuple[str, tuple[int, ...], torch.Tensor]], optim: OptimConfig, layers: Mapping[str, int]
) -> torch.optim.AdamW:
    """Fused AdamW over (name, whole shape, tensor); the tensor may be any shard of the parameter.

    The whole shape decides about decay: a shard stored flat has lost it. `layers` is the depth of each of the model's
    parameters, the head being the last: of two neighbours the first learns at `optim.layer_decay` of the other's rate
    (Bao et al., BEiT, 2021). The learning rate is set at every step by `set_lr`.
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
    """The state of one tensor, as the fused AdamW would create it at its first step."""
    optimizer.state[p] = {
        "step": torch.zeros((), dtype=torch.float32, device=p.device),
        "exp_avg": torch.zeros_like(p),
        "exp_avg_sq": torch.zeros_like(p),
    }


def global_norm(grads: Iterable[Tensor]) -> Tensor:
    """L2 norm over all given tensors together, [] in fp32 or better, on their device."""
    norms = torch.stack(torch._foreach_norm([grad.detach() for grad in grads]))
    return torch.linalg.vector_norm(norms, dtype=torch.promote_types(norms.dtype, torch.float32))


def clip_and_step(
    optimizer: torch.optim.AdamW,
    grads: list[Tensor],
    norm: Tensor,
    clip_norm: float | None,
    loss_scale: Tensor | None = None,
) -> StepResult:
    """Clip `grads` in place to `clip_norm` by their global `norm`, then update, without waiting for the device.

    Gradients and norm are `loss_scale` times too large, where it is given. A non-finite norm reaches the fused AdamW
    as `found_inf`, the flag of gradient scaling: the kernel then leaves parameters, moments and step counters
    untouched.
    """
    found_inf = (~torch.isfinite(norm)).float()
    factor = None
    if loss_scale is not None:
        norm, factor = norm / loss_scale, 1.0 / loss_scale
    if clip_norm is not None:
        clip = torch.clamp(clip_norm / (norm + 1e-6), max=1.0)
        factor = clip if factor is None else clip * factor
    if factor is not None:
        torch._foreach_mul_(grads, factor)
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    optimizer.step()
    return StepResult(norm, 1.0 - found_inf)


def set_lr(optimizer: torch.optim.Optimizer, lr: float, *, head_only: bool = False) -> None:
    """Set the schedule's learning rate, by each group's factor; with `head_only` the rest neither learns nor decays."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"] if group["is_head"] or not head_only else 0.0
