"""Train with engine ddp: the whole model on every rank, gradients averaged by DistributedDataParallel."""

import warnings

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gcvit.config.schema import OptimConfig
from gcvit.model import GCViT
from gcvit.optim.adamw import Counters, Updater
from gcvit.optim.clip_grad import StepResult
from gcvit.parallel.engine import Fragment, Fragments
from gcvit.runtime.distributed import World


class DdpEngine:
    """Implement `Engine` with replicated weights.

    `module` is on the meta device. A `dtype` below fp32 is autocast over fp32 weights.
    """

    def __init__(
        self,
        module: GCViT,
        optim: OptimConfig,
        world: World,
        *,
        img_size: int,
        global_batch_size: int,
        num_micro_steps: int,
        dtype: torch.dtype,
    ):
        module.to_empty(device=world.device)
        module.init_buffers()
        for p in module.parameters():
            nn.init.zeros_(p)  # until the fragments are filled: a NaN would spread in the dry passes below
        self.module = module
        self.world = world
        self._ddp = DistributedDataParallel(module, gradient_as_bucket_view=True, init_sync=False)
        self._shapes = {name: p.shape for name, p in module.named_parameters()}
        self._loss_factor = world.size / global_batch_size  # DDP averages over ranks
        self._num_micro_steps = num_micro_steps
        self._autocast = torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)
        # Gradients are views of buckets. If they were dropped, earlier micro-steps would sum in memory of their own.
        keeps_gradients = num_micro_steps > 1
        # Before the moments are allocated: its activations and first buckets use their memory.
        self._rebuild_buckets(img_size, keeps_gradients)
        self._updater = Updater(
            dict(module.named_parameters()),
            self._shapes,
            module.find_layers(),
            optim,
            world.device,
            fp16=dtype == torch.float16,
            keeps_gradients=keeps_gradients,
        )
        self._begin_micro_step(0)

    def __call__(self, images: Tensor) -> Tensor:
        with self._autocast:
            model = self._ddp if self.module.training else self.module
            return model(images).float()

    def backward(self, loss_sum: Tensor) -> None:
        self._updater.scaled(loss_sum * self._loss_factor).backward()
        self._begin_micro_step(self._micro_step + 1)

    def step(self, lr: float, *, head_only: bool = False) -> StepResult:
        assert self._micro_step == self._num_micro_steps, f"step after {self._micro_step} micro-steps"
        result = self._updater.step(lr, head_only=head_only)
        self._begin_micro_step(0)
        return result

    def fragments(self) -> dict[str, Fragments]:
        rank, size = self.world.rank, self.world.size
        return {
            kind: {
                name: Fragment(tensor.detach().view(-1), 0, self._shapes[name], replica=rank, num_replicas=size)
                for name, tensor in tensors.items()
            }
            for kind, tensors in self._updater.tensors().items()
        }

    def refresh(self) -> None:
        """Do nothing: the fragments are the model's own weights."""

    def counters(self) -> Counters:
        return self._updater.counters()

    def set_counters(self, counters: Counters) -> None:
        self._updater.set_counters(counters)

    def _begin_micro_step(self, micro_step: int) -> None:
        self._micro_step = micro_step
        # `no_sync()` sets it too, in a context that would have to span forward and backward.
        self._ddp.require_backward_grad_sync = micro_step == self._num_micro_steps - 1

    def _rebuild_buckets(self, img_size: int, keeps_gradients: bool) -> None:
        """Have DDP rebuild its buckets before the first step.

        DDP rebuilds them after the first backward pass, in the order in which gradients arrived. A resumed run would
        then reduce its first step in another order than the run that it continues, and differ in the last bit. Two
        dry passes make both runs alike; their gradients are dropped.
        """
        image = torch.zeros(1, 3, img_size, img_size, device=self.world.device)
        self.module.train()
        # Do not compile for a batch of one image.
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            # It concerns weights with sides of 1, where all strides mean the same layout. PyTorch warns once, here.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            for _ in range(2):
                self.module.zero_grad()  # frees the first buckets before the second ones are allocated
                with self._autocast:
                    self._ddp(image).float().sum().backward()
        # As after every step: DDP scales gradients that exist in another way than gradients that do not.
        self.module.zero_grad(set_to_none=not keeps_gradients)
