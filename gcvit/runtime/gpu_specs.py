"""List the memory and the peak FLOP/s of GPUs, for plans and for model FLOPs utilization.

Peaks are for dense matrices. Data sheets that state them "with sparsity" count zeros and are halved here. fp32 is
not rounded to TF32 (see `gcvit.runtime.distributed`), so its peak is without tensor cores.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from gcvit.errors import UserError

_TERA = 1e12


@dataclass(frozen=True)
class Device:
    """Describe one model of GPU. `peaks` are FLOP/s by precision; an unsupported precision has none."""

    name: str
    torch_names: tuple[str, ...]
    """The names that `torch.cuda.get_device_name` returns. A slice of a GPU (MIG) has a longer name."""
    memory_bytes: int
    """From the data sheet, whose GB are 10^9 bytes. A driver reports a few percent more or less."""
    peaks: Mapping[str, float]

    @property
    def runs_triton(self) -> bool:
        """Whether attention "auto" uses the Triton kernels: from `kernels.CAPABILITY` on, as bf16 does."""
        return "bf16" in self.peaks


def _device(name: str, torch_names: tuple[str, ...], gigabytes: int, fp32: float, half: float, bf16: bool) -> Device:
    """Make a row of the table; `fp32` and `half` (16 bits, accumulated in fp32) are in TFLOP/s."""
    peaks = {"fp32": fp32 * _TERA, "fp16": half * _TERA} | ({"bf16": half * _TERA} if bf16 else {})
    return Device(name, torch_names, gigabytes * 10**9, peaks)


# fmt: off
_ALL = [
    # V100 data sheet (NVIDIA 1165301, January 2020): SXM2; its tensor cores support fp16 only.
    _device("v100-32", ("Tesla V100-SXM2-32GB",), 32, 15.7, 125, bf16=False),
    # A100 data sheet (NVIDIA 1758950, June 2021): the same peaks for PCIe and SXM.
    _device("a100-40", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 40, 19.5, 312, bf16=True),
    _device("a100-80", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), 80, 19.5, 312, bf16=True),
    # H100 data sheet (NVIDIA 2430615, 2023), SXM: 1,979 with sparsity, PCIe: 1,513 with sparsity.
    _device("h100-80", ("NVIDIA H100 80GB HBM3",), 80, 67, 1979 / 2, bf16=True),
    _device("h100-pcie", ("NVIDIA H100 PCIe",), 80, 51, 1513 / 2, bf16=True),
    # H200 data sheet (NVIDIA, 2024), SXM: the H100's chip, 1,979 with sparsity.
    _device("h200", ("NVIDIA H200",), 141, 67, 1979 / 2, bf16=True),
    # A10 data sheet (NVIDIA, March 2021): bf16 125, 250 with sparsity.
    _device("a10", ("NVIDIA A10",), 24, 31.2, 125, bf16=True),
    # L4 data sheet (NVIDIA, March 2023): 242 with sparsity.
    _device("l4", ("NVIDIA L4",), 24, 30.3, 121, bf16=True),
    # L40S data sheet (NVIDIA, 2023): 362.05, 733 with sparsity.
    _device("l40s", ("NVIDIA L40S",), 48, 91.6, 362.05, bf16=True),
    # "NVIDIA Ada GPU architecture" (white paper, 2023), appendix A: GeForce cards sum fp16 in fp32 at half speed.
    _device("rtx4090", ("NVIDIA GeForce RTX 4090",), 24, 82.6, 165.2, bf16=True),
]
# fmt: on
DEVICES: dict[str, Device] = {device.name: device for device in _ALL}


def find_device(torch_name: str) -> Device | None:
    """Return the row of a GPU by the name that PyTorch gives it, or None if the table lacks it."""
    return next((device for device in _ALL if torch_name in device.torch_names), None)


def get_device(name: str) -> Device:
    """Return the row named `name`.

    Raises:
        UserError: if there is none; the hint names the nearest.
    """
    if name not in DEVICES:
        near = [known for known in DEVICES if known.startswith(name)] or difflib.get_close_matches(name, DEVICES, n=1)
        hint = f"did you mean {near[0]}?" if near else None
        raise UserError("unknown GPU", got=name, expected=", ".join(DEVICES), hint=hint)
    return DEVICES[name]
