"""DeepSpeed is what the patches were written for, and still needs each of them."""

import inspect
import tomllib
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.ops import __compatible_ops__
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import nn

from gcvit.parallel import deepspeed_patches
from gcvit.parallel.deepspeed_patches import (
    SHARED_MEMORY_COLLECTIVE,
    prepare_environment,
    release_linear_weights,
    use_zero_optimizer_in_bf16,
)
from tests.helpers.launching import ROOT


def test_the_release_is_the_one_that_the_patches_name():
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"deepspeed=={deepspeed.__version__}" in required
    assert f"DeepSpeed {deepspeed.__version__}" in deepspeed_patches.__doc__


def choose_optimizer(stage: int) -> str:
    """Ask DeepSpeed for the kind of optimizer of a model in bf16 whose gradients are summed in fp32."""
    engine = SimpleNamespace(
        get_data_types=lambda: (torch.bfloat16, torch.float32),
        zero_optimization=lambda: True,
        zero_optimization_stage=lambda: stage,
        zero_cpu_offload=lambda: False,
        zero_compute_grad_norm=lambda: True,
    )
    return DeepSpeedEngine._do_optimizer_sanity_check(engine, None)


def test_stage_1_in_bf16_would_have_another_optimizer(monkeypatch):
    # It asks DeepSpeed's process group for the rank, in order to log.
    monkeypatch.setattr("deepspeed.runtime.engine.is_zero_supported_optimizer", lambda optimizer: True)
    assert list(inspect.signature(DeepSpeedEngine._do_optimizer_sanity_check).parameters) == ["self", "basic_optimizer"]
    assert choose_optimizer(2) == ZERO_OPTIMIZATION
    assert choose_optimizer(1) != ZERO_OPTIMIZATION
    with use_zero_optimizer_in_bf16():
        assert choose_optimizer(1) == ZERO_OPTIMIZATION
    assert choose_optimizer(1) != ZERO_OPTIMIZATION


def test_the_shared_memory_collective_is_an_option_of_deepspeed(monkeypatch):
    monkeypatch.setitem(__compatible_ops__, SHARED_MEMORY_COLLECTIVE, __compatible_ops__[SHARED_MEMORY_COLLECTIVE])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    __compatible_ops__[SHARED_MEMORY_COLLECTIVE] = True
    prepare_environment("cuda")
    assert __compatible_ops__[SHARED_MEMORY_COLLECTIVE]
    prepare_environment("cpu")
    assert not __compatible_ops__[SHARED_MEMORY_COLLECTIVE]


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_saves_no_view_of_its_weight(bias):
    """PyTorch's own does, and computes the same."""
    assert list(inspect.signature(zero3_linear_wrap).parameters) == ["input", "weight", "bias"]
    plain = nn.Linear(3, 5, bias=bias)
    patched = nn.Linear(3, 5, bias=bias)
    patched.load_state_dict(plain.state_dict())
    release_linear_weights(patched)
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    outputs, views = [], []
    for layer in (plain, patched):
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            outputs.append(layer(x.clone().requires_grad_()))
        weight = layer.weight
        views.append([t for t in saved if t is not weight and t.data_ptr() == weight.data_ptr()])
        outputs[-1].sum().backward()
    assert torch.equal(*outputs)
    assert torch.equal(plain.weight.grad, patched.weight.grad)
    assert (len(views[0]), len(views[1])) == (1, 0)
