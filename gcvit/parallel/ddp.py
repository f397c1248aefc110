"""Engine ddp: the whole model on every rank, gradients averaged by PyTorch's DistributedDataParallel."""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gcvit.config import OptimConfig
from gcvit.model import GCViT
from gcvit.optim import build_adamw, clip_and_step, create_moments, global_norm
from gcvit.parallel.engine import EXP_AVG, EXP_AVG_SQ, MODEL, Counters, Fragment, Fragments, StepResult
from gcvit.parallel.world import World


class DdpEngine:
    """See `engine.py`. `module` is on the meta device; bf16 is autocast over fp32 weights."""

    def __init__(
        self,
        module: GCViT,
        optim: OptimConfig,
        world: World,
        *,
        img_size: int,
        global_batch_size: int,
        num_micro_steps: int,
        bf16: bool,
    ):
        module.to_empty(device=world.device)
        module.init_buffers()
        for p in module.parameters():
            nn.init.zeros_(p)  # until the fragments are filled: the dry passes below must not meet a NaN
        self.module = module
        self.world = world
        self._ddp = DistributedDataParallel(module, gradient_as_bucket_view=True, init_sync=False)
        self._parameters = dict(module.named_parameters())
        self._optimizer = build_adamw(((n, tuple(p.shape), p) for n, p in self._parameters.items()), optim)
        create_moments(self._optimizer)
        self._clip_norm = optim.clip_norm
        self._loss_scale = world.size / global_batch_size  # DDP averages over ranks
        self._num_micro_steps = num_micro_steps
        self._autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=bf16)
        self._settle_buckets(img_size)
        self._begin_micro_step(0)

    def __call__(self, images: Tensor) -> Tensor:
        with self._autocast:
            model = self._ddp if self.module.training else self.module
            return model(images).float()

    def backward(self, loss_sum: Tensor) -> None:
        (loss_sum * self._loss_scale).backward()
        self._begin_micro_step(self._micro_step + 1)

    def step(self, lr: float) -> StepResult:
        assert self._micro_step == self._num_micro_steps, f"step after {self._micro_step} micro-steps"
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        result = clip_and_step(self._optimizer, grads, global_norm(grads), self._clip_norm, lr)
        self._optimizer.zero_grad()
        self._begin_micro_step(0)
        return result

    def fragments(self) -> dict[str, Fragments]:
        return {
            MODEL: {name: self._whole(p.detach(), p.shape) for name, p in self._parameters.items()},
            **{
                kind: {n: self._whole(self._optimizer.state[p][kind], p.shape) for n, p in self._parameters.items()}
                for kind in (EXP_AVG, EXP_AVG_SQ)
            },
        }

    def refresh(self) -> None:
        """Nothing to do: the fragments are the model's own weights."""

    def counters(self) -> Counters:
        return Counters(updates=int(next(iter(self._optimizer.state.values()))["step"].item()))

    def set_counters(self, counters: Counters) -> None:
        for state in self._optimizer.state.values():
            state["step"].fill_(counters.updates)

    def _whole(self, tensor: Tensor, shape: torch.Size) -> Fragment:
        return Fragment(tensor.view(-1), 0, shape, replica=self.world.rank, num_replicas=self.world.size)

    def _begin_micro_step(self, micro_step: int) -> None:
        self._micro_step = micro_step
        # What `no_sync()` sets, without a context that would have to span forward and backward.
        self._ddp.require_backward_grad_sync = micro_step == self._num_micro_steps - 1

    def _settle_buckets(self, img_size: int) -> None:
        """Let DDP rebuild its buckets before the first step.

        It does so after the first backward, in the order in which gradients came: a resumed run would reduce its
        first step in another order than the run that it continues, and differ in the last bit. Two dry passes make
        both alike; the gradients are dropped.
        """
        image = torch.zeros(1, 3, img_size, img_size, device=self.world.device)
        self.module.train()
        for _ in range(2):
            with self._autocast:
                self._ddp(image).float().sum().backward()
            self.module.zero_grad()
