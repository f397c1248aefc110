"""Fixtures of the unit tests: a process group of one."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

    from gcvit.runtime.distributed import World


@pytest.fixture(scope="module")
def world(device: "torch.device") -> Iterator["World"]:
    """Join a world of one on `device`, one for a whole file: DeepSpeed keeps the first process group that it sees."""
    import torch

    from gcvit.runtime.distributed import join_world

    torch.set_num_threads(1)
    # Tests compare bits, and on a GPU only deterministic kernels repeat them. The fill is what PyTorch has by default.
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with join_world(deterministic=device.type == "cuda") as joined:
        yield joined
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
