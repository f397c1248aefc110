"""Checkpoint activations: drop what a part of the model computed, and compute it again in backward."""

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gcvit.model import GCViT
from gcvit.model.layers import Block

# The operations of `F.linear`. Attention's products are computed again: they are quick, and the scores of a 14 x 14
# window are larger than all outputs of linear layers in its block. Convolutions make the model's largest maps.
_LINEAR = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)


def recompute_parts(model: GCViT, mode: str) -> None:
    """Checkpoint parts of the model in place.

    The last part is never checkpointed: backward begins with it, so recomputing it costs time and lowers no peak.

    Args:
        mode: "none" for nothing, "blocks" for the blocks, "full" for all cut points, "selective" for all cut points
            except the outputs of their linear layers. `activation_budget.py` has the mode "budget".
    """
    if mode == "none":
        return
    assert mode in ("blocks", "full", "selective"), mode
    names = model.cut_points()[:-1]
    if mode == "blocks":
        names = [name for name in names if isinstance(model.get_submodule(name), Block)]
    recompute(model, names, keep_linear=mode == "selective")


def recompute(model: GCViT, names: Sequence[str], *, keep_linear: bool = False) -> None:
    """Checkpoint the cut points `names`: each stores its inputs, and with `keep_linear` the outputs of linear layers.

    The forward of each part is wrapped, not the module, so that parameter names stay. The state of the random
    generator is stored too, so that drop path draws the same numbers both times.
    """
    for name in names:
        part = model.get_submodule(name)
        part.forward = functools.partial(_forward, part.forward, part, keep_linear)


def _forward(forward: Callable[..., Tensor], part: nn.Module, keep_linear: bool, *inputs: Tensor) -> Tensor:
    if not part.training:
        return forward(*inputs)
    if not keep_linear:
        return checkpoint(forward, *inputs, use_reentrant=False)
    context = _mark_products if torch.compiler.is_compiling() else _keep_products
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=context)


def _keep_products() -> tuple["_Keep", "_Reuse"]:
    """Return the contexts of forward and of its recomputation.

    PyTorch's own contexts require the same operations both times. Under ZeRO-3 they differ: parameters are gathered
    inside, if they are not gathered already.
    """
    products: deque[Tensor] = deque()
    return _Keep(products), _Reuse(products)


class _Keep(TorchDispatchMode):
    """Store the outputs of linear layers."""

    def __init__(self, products: deque[Tensor]):
        super().__init__()
        self._products = products

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if op in _LINEAR:
            self._products.append(out.detach())  # `out` itself would be part of a reference cycle with the graph
        return out


class _Reuse(TorchDispatchMode):
    """Return the stored outputs, in the same order, instead of computing them."""

    def __init__(self, products: deque[Tensor]):
        super().__init__()
        self._products = products
        self._last: Tensor | None = None

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in _LINEAR:
            self._last = self._products.popleft()
            return self._last
        if op is torch.ops.aten.add_.Tensor and self._last is not None and _share_memory(args[0], self._last):
            return args[0]  # ZeRO-3 adds the bias in place: the stored output includes it
        return op(*args, **(kwargs or {}))


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _choose(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _LINEAR else CheckpointPolicy.PREFER_RECOMPUTE


# The compiler requires PyTorch's contexts, which mark its graph.
_mark_products = functools.partial(create_selective_checkpoint_contexts, _choose)
