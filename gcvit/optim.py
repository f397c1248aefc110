"""AdamW in two groups, with and without weight decay; clipping and stepping without a word to the host."""

from collections.abc import Iterable

import torch
from torch import Tensor

from gcvit.config import OptimConfig
from gcvit.parallel.engine import StepResult

BIAS_TABLE = "bias_table"


def decays(name: str, shape: Iterable[int], *, decay_bias_tables: bool) -> bool:
    """Whether a parameter decays: matrices and convolutions do, vectors and biases do not.

    Relative-position bias tables are matrices in form and biases in use: the published runs decay them (their
    exemption names a parameter that does not exist), timm does not, so it is a choice.
    """
    if name.endswith(BIAS_TABLE):
        return decay_bias_tables
    return len(tuple(shape)) > 1 and not name.endswith(".bias")


def build_adamw(
    parameters: Iterable[tuple[str, tuple[int, ...], torch.Tensor]], optim: OptimConfig
) -> torch.optim.AdamW:
    """Fused AdamW over (name, whole shape, tensor); the tensor may be any shard of the parameter.

    The whole shape decides about decay: a shard stored flat has lost it. The learning rate is set at every step
    from the schedule.
    """
    groups: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for name, shape, tensor in parameters:
        groups[decays(name, shape, decay_bias_tables=optim.decay_bias_tables)].append(tensor)
    return torch.optim.AdamW(
        [
            {"params": groups[decay], "weight_decay": optim.weight_decay if decay else 0.0}
            for decay in (True, False)
            if groups[decay]
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
    optimizer: torch.optim.AdamW, grads: list[Tensor], norm: Tensor, clip_norm: float | None, lr: float
) -> StepResult:
    """Clip `grads` in place to `clip_norm` by their global `norm`, then update, without waiting for the device.

    A non-finite norm reaches the fused AdamW as `found_inf`, the flag of gradient scaling: the kernel then leaves
    parameters, moments and step counters untouched.
    """
    found_inf = (~torch.isfinite(norm)).float()
    if clip_norm is not None:
        torch._foreach_mul_(grads, torch.clamp(clip_norm / (norm + 1e-6), max=1.0))
    set_lr(optimizer, lr)
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    optimizer.step()
    return StepResult(norm, 1.0 - found_inf)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
