"""The Triton attention as torch sees it: in autograd, compiled, checkpointed, under autocast, in a whole model.

test_window_kernels.py runs this file in Triton's interpreter; without TRITON_INTERPRET=1 it runs on a GPU.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gcvit.errors import UserError
from gcvit.model import create_model
from gcvit.model.attention import WindowAttention
from gcvit.model.kernels.window_attention import run_backward, run_forward, window_attention
from gcvit.model.kernels.window_kernels import IS_INTERPRETED
from gcvit.model.layers import Block
from gcvit.parallel.activation_checkpointing import recompute

DEVICE = "cpu" if IS_INTERPRETED.value else "cuda"
FORWARD, BACKWARD, LINEAR = "gcvit::window_attention", "gcvit::window_attention_backward", "aten::addmm"
LOCAL_AND_GLOBAL = pytest.mark.parametrize("shared", [False, True], ids=["local", "global"])


@pytest.fixture(autouse=True)
def tensors_on_the_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


class CountOperations(TorchDispatchMode):
    """How often each operation runs in eager mode: the profiler would count it again in each mode it passes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[op.name().split(".")[0]] += 1
        return op(*args, **(kwargs or {}))


class CountCompiled(torch.profiler.profile):
    """How often each operation runs in compiled code, which no mode sees."""

    @property
    def counts(self) -> dict[str, int]:
        return {event.key: event.count for event in self.key_averages()}


def make_inputs(shared: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Parts, queries and bias table for windows of 3, the last ones beyond the map."""
    torch.manual_seed(0)
    parts = torch.randn(2, 4, 3, (2 if shared else 3) * 16, requires_grad=True)
    queries = torch.randn(2, 3, 3, 16, requires_grad=True) if shared else None
    return parts, queries, torch.randn(25, 1, requires_grad=True)


def make_attention(shared: bool, path: str = "triton") -> WindowAttention:
    torch.manual_seed(0)
    attention = WindowAttention(32, 2, 3, uses_global_queries=shared, path=path)
    nn.init.normal_(attention.bias_table)
    return attention


def run(module: nn.Module, x: Tensor, queries: Tensor) -> list[Tensor]:
    """Output, and gradients of the inputs and of all parameters."""
    wanted = [x.detach().requires_grad_(), queries.detach().requires_grad_()]
    out = module(*wanted)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    gradients = torch.autograd.grad((out * weights).sum(), [*wanted, *module.parameters()], allow_unused=True)
    return [out.detach(), *(gradient for gradient in gradients if gradient is not None)]


def is_close(ours: list[Tensor], others: list[Tensor], tolerance: float) -> bool:
    assert len(ours) == len(others)
    return all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(ours, others, strict=True))


@LOCAL_AND_GLOBAL
def test_operators_keep_their_word(shared: bool) -> None:
    parts, queries, table = make_inputs(shared)
    settings = (3, 1, 0.25)
    torch.library.opcheck(run_forward, (parts, queries, table, *settings))
    with torch.no_grad():
        out, lse = run_forward(parts, queries, table, *settings)
        backward = (torch.randn_like(out), parts.detach(), queries, table.detach(), out, lse, *settings)
        tests = ("test_schema", "test_faketensor")  # it has no gradient of its own
        torch.library.opcheck(run_backward, backward, test_utils=tests)


@LOCAL_AND_GLOBAL
def test_a_compiled_attention_is_one_graph(shared: bool) -> None:
    attention, x, queries = make_attention(shared), torch.randn(2, 3, 5, 32), torch.randn(2, 3, 3, 32)
    expected = run(attention, x, queries)
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert is_close(run(compiled, x, queries), expected, 1e-6)


@LOCAL_AND_GLOBAL
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("keep_linear", [False, True], ids=["all", "selective"])
def test_a_checkpointed_block_attends_twice_and_gives_the_same(
    shared: bool, is_compiled: bool, keep_linear: bool
) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"mlp_ratio": 2.0, "layer_scale": None, "drop_path_rate": 0.0, "attention": "triton"}
    block = Block(32, 2, 3, uses_global_queries=shared, **sizes)
    nn.init.normal_(block.attention.bias_table)
    x, queries = torch.randn(2, 3, 5, 32), torch.randn(2, 3, 3, 32)

    with CountOperations() as operations:
        expected = run(block, x, queries)
    before = operations.counts
    assert (before[FORWARD], before[BACKWARD], before[LINEAR]) == (1, 1, 4)
    recompute(nn.ModuleDict({"block": block}), ["block"], keep_linear=keep_linear)
    if is_compiled:
        torch._dynamo.reset()
        block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager", dynamic=False)
        run(block, x, queries)  # compiles
    with CountCompiled() if is_compiled else CountOperations() as operations:
        ours = run(block, x, queries)
    after = operations.counts
    assert is_close(ours, expected, 1e-6)
    # Attention is computed again, which needs what the first linear layer gives; the MLP's output nobody needs.
    num_linear = 4 if keep_linear else 7
    assert (after[FORWARD], after[BACKWARD], after[LINEAR]) == (2, 1, num_linear)


@LOCAL_AND_GLOBAL
def test_autocast(shared: bool) -> None:
    """Parts come in bf16, queries and bias table in fp32; so do their gradients go."""
    x, queries = torch.randn(2, 3, 5, 32), torch.randn(2, 3, 3, 32)
    expected = run(make_attention(shared, "reference").double(), x.double(), queries.double())
    attention = make_attention(shared)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = run(attention, x, queries)
    assert [gradient.dtype for gradient in ours] == [torch.bfloat16, *[torch.float32] * (len(ours) - 1)]
    assert is_close([gradient.double() for gradient in ours], expected, 3e-2)


def test_a_whole_model() -> None:
    sizes: dict[str, Any] = {"width": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 1, 2, 4], "num_classes": 5}
    sizes["windows"] = [5, 3, 2, 2]  # which end beyond most of the maps
    models = [
        create_model("gc_vit_xxtiny", img_size=(32, 52), drop_path_rate=0.0, attention=path, **sizes)
        for path in ("triton", "reference")
    ]
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for ours, other in zip(*(model.parameters() for model in models), strict=True):
            if ours.ndim > 1:
                ours.copy_(torch.randn(ours.shape, generator=generator) * ours[0].numel() ** -0.5)
            other.copy_(ours)
    images = torch.randn(2, 3, 32, 52, generator=generator)
    results = []
    for model in models:
        logits = model(images)
        weights = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
        results.append([logits.detach(), *torch.autograd.grad((logits * weights).sum(), list(model.parameters()))])
    assert is_close(*results, tolerance=1e-4)
    alone = torch.cat([models[0](image[None]) for image in images]).detach()
    assert is_close([alone], results[0][:1], 1e-5)


def test_what_the_kernels_do_not_serve_is_refused() -> None:
    parts, _, table = (x if x is None else x.detach() for x in make_inputs(False))
    assert parts is not None
    assert table is not None
    with pytest.raises(UserError, match="cannot compute in this dtype"):
        window_attention(parts.double(), None, table, 3, 1, 0.25)
    with pytest.raises(UserError, match="width of a head"):
        window_attention(parts, None, table.expand(-1, 2), 3, 2, 0.25)
