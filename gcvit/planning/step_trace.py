"""What a training step allocates and frees, in order, recorded on tensors without memory: nothing is computed.

The model's own code runs forward, loss and backward under PyTorch's FakeTensorMode, and the dispatcher is watched: so
recomputed activations, in-place updates and copies within operations count as they fall, whatever autograd's hooks see
of them. Weights are left out, and so is what becomes of a gradient once it is there: an engine's business, which
`gcvit.planning.memory_simulator` plays over the same record, for all engines alike.

The tensors are a CPU's, since backward on those of a GPU wants a driver; `compute_as_on_gpu` has the model do what it
would do otherwise there.
"""

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gcvit.model import GCViT
from gcvit.model.attention import HAS_TRITON, WindowAttention
from gcvit.model.kernels import HEAD_DIMS
from gcvit.optim.loss import soft_target_loss

ROOT = ""
"""The part that is left of the model beside its cut points: the last norm and the head."""


class Event(NamedTuple):
    """`num_bytes` more, or fewer; or where the step is: `what` of `name`, a part of the model or a parameter.

    forward, forwarded, backward, backwarded: before and after a part's passes; gradient: a parameter's is complete;
    loss: all of forward is done; end: all of backward.
    """

    num_bytes: int
    what: str = ""
    name: str = ""


class Recorder(TorchDispatchMode):
    """Record the bytes of each tensor when it appears and when it is freed."""

    def __init__(self, excluded: set[int]):
        super().__init__()
        self.events: list[Event] = []
        self._known = excluded

    def mark(self, what: str, name: str = "") -> None:
        self.events.append(Event(0, what, name))

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, num_bytes = storage._cdata, storage.nbytes()
        if address in self._known or not num_bytes:
            return
        self._known.add(address)
        self.events.append(Event(num_bytes))
        # The storage's Python object lives as long as its memory does.
        weakref.finalize(storage, self._forget, address, num_bytes).atexit = False

    def _forget(self, address: int, num_bytes: int) -> None:
        self._known.discard(address)
        self.events.append(Event(-num_bytes))


def compute_as_on_gpu(model: GCViT, *, runs_triton: bool) -> None:
    """Have it take what attention "auto" takes there (`WindowAttention.choose_path`), and norms as autocast has them.

    In place; tensors may lie anywhere. `runs_triton` is false of GPUs that are too old for our kernels.
    """
    if runs_triton and HAS_TRITON:
        import gcvit.model.kernels.window_attention  # noqa: F401  (who counts FLOPs must know the operators)
    for module in model.modules():
        if isinstance(module, WindowAttention) and module.path == "auto":
            serves = runs_triton and HAS_TRITON and module.proj.in_features // module.num_heads in HEAD_DIMS
            module.path = "triton" if serves else "sdpa"
        elif isinstance(module, nn.LayerNorm):
            module.forward = partial(_normalize, module.forward)  # type: ignore[method-assign]


def record_step(model: GCViT, *, num_images: int, dtype: torch.dtype, autocast: bool) -> list[Event]:
    """The events of forward, loss and backward of a micro-batch; the model lies on meta, recomputation set up.

    Its weights are fp32 where `autocast` casts them to `dtype`, else of `dtype`, as are the images. Takes seconds.
    """
    model = copy.deepcopy(model).train()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        weights_dtype = torch.float32 if autocast else dtype
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=weights_dtype, device="cpu")))
        recorder = Recorder({p.untyped_storage()._cdata for p in model.parameters()})
        watch(model, recorder)
        with recorder:
            run_step(model, recorder, num_images, dtype, autocast=autocast)
    return recorder.events


def run_step(model: GCViT, recorder: Recorder, num_images: int, dtype: torch.dtype, *, autocast: bool) -> None:
    """Run forward, loss and backward of images, of which only the size is used."""
    images = torch.empty(num_images, *model.input_size)
    targets = torch.empty(num_images, max(1, model.num_classes))
    recorder.mark("forward", ROOT)
    with torch.autocast("cpu", dtype, enabled=autocast and dtype != torch.float32):
        logits = model(images if autocast else images.to(dtype)).float()
    recorder.mark("loss")
    loss = soft_target_loss(logits, targets).sum()
    # As the trainer's loop: images and targets live until the next ones are there.
    recorder.mark("backward", ROOT)
    loss.backward()
    recorder.mark("end")


def _normalize(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return forward(x.float() if torch.is_autocast_enabled("cpu") else x)


def _note_gradient(recorder: Recorder, name: str) -> Any:
    def note(p: Tensor) -> None:
        p.grad = None  # gone at once: the engine that keeps it says so
        recorder.mark("gradient", name)

    return note


def watch(model: GCViT, recorder: Recorder) -> None:
    """Record gradients, which are then freed, and the passes of the parts, by hooks on modules and outputs."""
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(_note_gradient(recorder, name))
    outputs: dict[str, Tensor] = {}  # of which no part is known yet that takes them

    def enter(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # A part is done with before the one before it begins: its hook comes first.
            if inputs[0].requires_grad:
                inputs[0].register_hook(lambda _: recorder.mark("backwarded", name))
            register_outputs()
            recorder.mark("forward", name)

        return hook

    def leave(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            recorder.mark("forwarded", name)
            outputs[name] = output

        return hook

    def register_outputs(*_: Any) -> None:
        for name, output in outputs.items():
            output.register_hook(lambda _, name=name: recorder.mark("backward", name))
        outputs.clear()

    for name in model.cut_points():
        part = model.get_submodule(name)
        part.register_forward_pre_hook(enter(name))
        part.register_forward_hook(leave(name))
    model.norm.register_forward_pre_hook(register_outputs)
