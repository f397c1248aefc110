"""What is changed in DeepSpeed for engine zero. Written for DeepSpeed 0.19.8, which pyproject.toml pins.

`tests/unit/parallel/test_deepspeed_patches.py` fails if a release changes what these functions replace, or no longer
needs them. Private names of DeepSpeed that are only read stand in `zero.py`; its tests compare digests of all tensors.
"""

import contextlib
import functools
import os
from collections.abc import Iterator

from deepspeed.ops import __compatible_ops__
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor, nn

SHARED_MEMORY_COLLECTIVE = "deepspeed_shm_comm"


def prepare_environment(device_type: str) -> None:
    """Set what DeepSpeed reads at its start, before `deepspeed.init_distributed`.

    DeepSpeed requires LOCAL_RANK for a single plain process too. On a CPU it would compile a collective in shared
    memory for half a minute; gloo does the same work without.
    """
    os.environ.setdefault("LOCAL_RANK", "0")
    if device_type == "cpu":
        __compatible_ops__[SHARED_MEMORY_COLLECTIVE] = False


@contextlib.contextmanager
def use_zero_optimizer_in_bf16() -> Iterator[None]:
    """Have stage 1 in bf16 use the same optimizer as all other stages and precisions, while the block runs.

    DeepSpeed would choose its `BF16_Optimizer` there. That class has other fragments, does not refuse non-finite
    gradients, and reduces without buckets.
    """
    original = DeepSpeedEngine._do_optimizer_sanity_check
    DeepSpeedEngine._do_optimizer_sanity_check = lambda engine, optimizer: ZERO_OPTIMIZATION
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = original


def release_linear_weights(module: nn.Module) -> None:
    """Have the linear layers of `module` release their gathered weights between forward and backward.

    PyTorch's linear operator saves a transposed view, which would keep the gathered weight alive. DeepSpeed by default
    replaces `torch.nn.functional.linear` in the whole process, for good; this changes the layers of `module` alone.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.forward = functools.partial(_run_linear, layer)  # type: ignore[method-assign]


def _run_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    y: Tensor = zero3_linear_wrap(x, layer.weight, layer.bias)
    return y
