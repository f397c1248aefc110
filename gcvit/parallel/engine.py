"""The contract of an engine, in words and types. The loop never asks which engine it has.

An engine owns the model, the optimizer and the way both are spread over the ranks:

- `engine(images)` runs the model in the engine's precision and gives fp32 logits.
- `backward(loss_sum)` takes the *sum* of the losses of one micro-batch. The engine scales it so that the update is
  the gradient of the mean over the global batch, however many ranks and micro-steps there are. Gradients are
  exchanged in the last of `num_micro_steps` only, where the engine's sharding allows.
- `step(lr, head_only=...)` clips by the global norm, refuses a non-finite gradient on all ranks alike, updates and
  zeroes. Its result stays on the device: reading it is up to the loop, at logging steps.
- `fragments()` shows what this rank holds of parameters and moments: contiguous ranges of flattened tensors, in fp32,
  the live memory itself. Writing into them and calling `refresh()` sets the model. Initial weights, checkpoints
  and the EMA are all done through this one door, so they are the same for every engine and world size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gcvit.model import GCViT
from gcvit.optim.adamw import Counters, StepResult
from gcvit.runtime.distributed import World


@dataclass(frozen=True)
class Fragment:
    """A contiguous range of a flattened tensor, as one rank holds it."""

    data: Tensor  # [n], fp32, a view of the live memory
    start: int  # place of data[0] in the flattened whole
    shape: torch.Size  # of the whole
    replica: int = 0  # which of `num_replicas` equal copies this is: each writes its part of a checkpoint
    num_replicas: int = 1


Fragments = dict[str, Fragment]  # by parameter name


class Engine(Protocol):
    """See this file's head."""

    module: GCViT
    world: World

    def __call__(self, images: Tensor) -> Tensor: ...

    def backward(self, loss_sum: Tensor) -> None: ...

    def step(self, lr: float, *, head_only: bool = False) -> StepResult:
        """With `head_only` the other weights stand still; their moments follow the gradients all the same."""
        ...

    def fragments(self) -> dict[str, Fragments]:
        """`{"model": ..., "exp_avg": ..., "exp_avg_sq": ...}`, each by parameter name."""
        ...

    def refresh(self) -> None:
        """Make the model compute with what now stands in the parameters' fragments."""
        ...

    def counters(self) -> Counters:
        """What is counted now (waits for the device)."""
        ...

    def set_counters(self, counters: Counters) -> None: ...


def fill(fragments: Fragments, value_of: Callable[[str], Tensor]) -> None:
    """Set each fragment from the whole tensor that `value_of(name)` gives, one tensor at a time."""
    with torch.no_grad():
        for name, fragment in fragments.items():
            whole = value_of(name)
            assert whole.shape == fragment.shape, f"{name}: {tuple(whole.shape)} for {tuple(fragment.shape)}"
            stop = fragment.start + fragment.data.numel()
            fragment.data.copy_(whole.reshape(-1)[fragment.start : stop])
