"""Define the contract of an engine. The training loop never asks which engine it has.

An engine owns the model and the optimizer, and distributes both over the ranks:

- `engine(images)` runs the model in the engine's precision and returns fp32 logits.
- `backward(loss_sum)` takes the *sum* of the losses of one micro-batch. The engine scales it so that the update is
  the gradient of the mean over the global batch, however many ranks and micro-steps there are. Gradients are
  reduced over ranks in the last of `num_micro_steps` only, if the engine's sharding allows.
- `step(lr, head_only=...)` clips by the global norm (`optim/clip_grad.py`; under ZeRO, DeepSpeed itself), refuses a
  non-finite gradient on all ranks alike, updates and zeroes the gradients. Its result stays on the device: the
  loop reads it at logging steps.
- `fragments()` returns what this rank holds of parameters and moments: contiguous ranges of flattened tensors, in
  fp32, views of the live memory. Write into them and call `refresh()` to set the model. Initial weights, checkpoints
  and the EMA use nothing else, so they are the same for every engine and world size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gcvit.model import GCViT
from gcvit.optim.adamw import Counters
from gcvit.optim.clip_grad import StepResult
from gcvit.runtime.distributed import World


@dataclass(frozen=True)
class Fragment:
    """Hold a contiguous range of a flattened tensor, as one rank has it."""

    data: Tensor  # [n], fp32, a view of the live memory
    start: int  # position of data[0] in the flattened whole
    shape: torch.Size  # of the whole
    replica: int = 0  # which of `num_replicas` equal copies this is: each writes its part of a checkpoint
    num_replicas: int = 1


Fragments = dict[str, Fragment]  # by parameter name


class Engine(Protocol):
    """Describe what the loop, checkpoints and the EMA call. The module docstring has the contract."""

    module: GCViT
    world: World

    def __call__(self, images: Tensor) -> Tensor: ...

    def backward(self, loss_sum: Tensor) -> None: ...

    def step(self, lr: float, *, head_only: bool = False) -> StepResult:
        """Clip, update and zero the gradients. With `head_only` only the head's weights change, and all moments do."""
        ...

    def fragments(self) -> dict[str, Fragments]:
        """Return `{"model": ..., "exp_avg": ..., "exp_avg_sq": ...}`, each by parameter name."""
        ...

    def refresh(self) -> None:
        """Copy the parameters' fragments into the weights that the model computes with."""
        ...

    def counters(self) -> Counters:
        """Return the current counters. Waits for the device."""
        ...

    def set_counters(self, counters: Counters) -> None: ...


def fill(fragments: Fragments, value_of: Callable[[str], Tensor]) -> None:
    """Fill each fragment from the whole tensor that `value_of(name)` returns, one tensor at a time."""
    with torch.no_grad():
        for name, fragment in fragments.items():
            whole = value_of(name)
            assert whole.shape == fragment.shape, f"{name}: {tuple(whole.shape)} for {tuple(fragment.shape)}"
            stop = fragment.start + fragment.data.numel()
            fragment.data.copy_(whole.reshape(-1)[fragment.start : stop])
