"""The Triton kernels compiled for GPUs that need not be here, down to machine code.

test_window_kernels.py runs this file in a process of its own, since it takes the GPU's driver away from Triton. With
`-s` it prints what each kernel takes.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gcvit.model.kernels import DTYPES, HEAD_DIMS, bias_kernels, window_kernels
from gcvit.model.kernels import window_attention as host

# Of one program: what the smallest GPUs of these generations have (8.6 and 8.9). An A100 has 163 KB, an H100 227.
MAX_SHARED_BYTES = 99 * 1024
REGISTERS_OF_A_PROCESSOR = 64 * 1024
BF16, FP32 = torch.bfloat16, torch.float32
ATTENTION = ("attend_windows", "backward_pairs", "backward_tiles")
KERNELS = {window_kernels: ATTENTION, bias_kernels: ("expand_bias", "fold_bias_gradient")}
LOCAL_AND_GLOBAL = pytest.mark.parametrize("shared", [False, True], ids=["local", "global"])


@dataclass(frozen=True)
class Program:
    """What the compiler made of a kernel."""

    ptx: str = field(repr=False)
    num_threads: int
    registers: int  # of a thread
    stack_bytes: int  # of a thread: where registers spill to, in the slowest memory
    shared_bytes: int


class Compiler:
    """Stands in for a kernel: a launch compiles it, for the arguments it is launched with."""

    def __init__(self, kernel: Any, programs: dict[str, Program], folder: Path):
        self.kernel, self.programs, self.folder = kernel, programs, folder

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_kernel(*arguments: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            path = self.folder / "kernel.cubin"
            path.write_bytes(compiled.asm["cubin"])
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
            assert found, usage
            resources = (32 * compiled.metadata.num_warps, int(found[1]), int(found[2]), compiled.metadata.shared)
            self.programs[self.kernel.fn.__name__] = Program(compiled.asm["ptx"], *resources)

        return compile_kernel


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Program]]:
    """By their names, the programs that were launched last."""
    assert not window_kernels.IS_INTERPRETED.value
    programs: dict[str, Program] = {}
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Compiler(getattr(module, name), programs, tmp_path))
    monkeypatch.setattr(host.Problem, "kernels", window_kernels)  # no GPU is asked for
    yield programs
    for name, program in programs.items():
        print(f"{name:18} {program}")


def attend(
    capability: int,
    dtype: torch.dtype,
    window: int,
    *,
    shared: bool,
    head_dim: int = 32,
    num_images: int = 128,
    sides: tuple[int, int] | None = None,
) -> None:
    """Forward and backward pass of four heads on a GPU of this capability, in name."""
    target = GPUTarget("cuda", capability, 32)
    # Triton keeps what it compiled by the device's number: one for each kind.
    numbers = {"get_current_device": lambda: capability, "get_current_stream": lambda device: 0}
    driver.set_active(SimpleNamespace(get_current_target=lambda: target, **numbers))
    settings, dim = (window, 4, head_dim**-0.5), 4 * head_dim
    with torch.device("meta"):
        parts = torch.empty(num_images, *(sides or (2 * window, window)), (2 if shared else 3) * dim, dtype=dtype)
        queries = torch.empty(num_images, window, window, dim, dtype=dtype) if shared else None
        table = torch.empty((2 * window - 1) ** 2, 4)
    out, lse = host.run_forward._init_fn(parts, queries, table, *settings)
    host.run_backward._init_fn(out, parts, queries, table, out, lse, *settings)


def check(programs: dict[str, Program], window: int, dtype: torch.dtype, max_stack_bytes: int) -> None:
    """That each kernel of a pass was compiled, and fits the chip."""
    kernels = {name for names in KERNELS.values() for name in names}
    is_whole = window**2 <= host.BLOCKS[dtype.itemsize]
    assert programs.keys() == (kernels - {"backward_tiles"} if is_whole else kernels)
    for name, program in programs.items():
        assert program.shared_bytes <= MAX_SHARED_BYTES, name
        assert program.stack_bytes <= max_stack_bytes, name
        # At least two on a processor, so that one computes while the other waits; of fp32's larger ones, one.
        num_programs = REGISTERS_OF_A_PROCESSOR // (program.registers * program.num_threads)
        assert num_programs >= (2 if program.num_threads == 128 else 1), name


QUICK = [(90, BF16, 7), (90, BF16, 14), (80, BF16, 7), (90, FP32, 14)]
ALL = [
    pytest.param(capability, dtype, window, marks=() if (capability, dtype, window) in QUICK else pytest.mark.slow)
    for capability in (90, 80)
    for dtype in (BF16, FP32)
    for window in (7, 12, 14, 16, 24, 32)
]


@LOCAL_AND_GLOBAL
@pytest.mark.parametrize(("capability", "dtype", "window"), ALL)
def test_the_published_windows_fit_the_chip(
    programs: dict[str, Program], capability: int, dtype: torch.dtype, window: int, shared: bool
) -> None:
    attend(capability, dtype, window, shared=shared)
    # On Hopper in bf16 nothing spills. A hundred bytes do on Ampere, whose tensor cores read registers alone.
    check(programs, window, dtype, max_stack_bytes=0 if capability == 90 and dtype == BF16 else 128)
    instruction = "wgmma.mma_async" if capability == 90 else "mma.sync"
    for name in programs.keys() & ATTENTION:
        assert (instruction in programs[name].ptx) == (dtype == BF16), name  # fp32 is never rounded to tf32
        assert "cp.async" in programs[name].ptx, name  # what comes next is loaded meanwhile


@LOCAL_AND_GLOBAL
@pytest.mark.parametrize(
    ("num_images", "sides"),
    [
        (1, (1, 1)),  # Triton compiles a 1 as a constant
        (2, (9, 20)),  # windows end beyond the map
    ],
)
def test_other_maps_compile(
    programs: dict[str, Program], num_images: int, sides: tuple[int, int], shared: bool
) -> None:
    attend(90, BF16, 7, shared=shared, num_images=num_images, sides=sides)
    check(programs, 7, BF16, max_stack_bytes=0)


@pytest.mark.slow
@LOCAL_AND_GLOBAL
@pytest.mark.parametrize("window", [14])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_width_of_a_head_fits_the_chip(
    programs: dict[str, Program], head_dim: int, dtype: torch.dtype, window: int, shared: bool
) -> None:
    attend(90, dtype, window, shared=shared, head_dim=head_dim)
    check(programs, window, dtype, max_stack_bytes=256)
