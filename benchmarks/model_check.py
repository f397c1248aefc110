"""Check that each attention path is right on the device where it is timed. Used by `benchmarks.model`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gcvit.model.attention import WindowAttention

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Of the relative L2 error of an output or a gradient: above rounding in that precision, far below a wrong pair."""
HEADS, CHANNELS = 2, 64
MAPS = {7: (14, 14), 14: (14, 14), 12: (20, 27)}
"""Sides of a window, and of the map: as at 224, and one where windows end beyond the map."""


@dataclass
class Verdict:
    """Hold the largest relative L2 error of a path in a precision, or the reason why there is none."""

    path: str
    dtype: torch.dtype
    error: float | None
    failure: str | None = None

    @property
    def is_right(self) -> bool:
        return self.error is not None and self.error <= TOLERANCES[self.dtype]

    def __str__(self) -> str:
        precision = str(self.dtype).removeprefix("torch.")
        if self.error is None:
            return f"{self.path} in {precision}: failed, {self.failure}"
        sense = "right" if self.is_right else "WRONG"
        return f"{self.path} in {precision}: {sense}, largest error {self.error:.1e} (up to {TOLERANCES[self.dtype]})"


def check_paths(paths: list[str], device: torch.device) -> list[Verdict]:
    """Compare each path in fp32 and bf16, local and global, outputs and all gradients, with a float64 reference."""
    verdicts = []
    for path in paths:
        for dtype in TOLERANCES:
            try:
                verdicts.append(Verdict(path, dtype, find_error(path, dtype, device)))
            except Exception as error:  # one that does not run here must not keep the others from being timed
                verdicts.append(Verdict(path, dtype, None, describe(error)))
    return verdicts


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"


def find_error(path: str, dtype: torch.dtype, device: torch.device) -> float:
    worst = 0.0
    for window, (height, width) in MAPS.items():
        for uses_global_queries in (False, True):
            torch.manual_seed(window)
            exact = WindowAttention(CHANNELS, HEADS, window, uses_global_queries, "reference")
            for parameter in exact.parameters():
                torch.nn.init.normal_(parameter, std=0.5 if parameter is exact.bias_table else 0.1)
            maps = torch.randn(3, height, width, CHANNELS), torch.randn(3, window, window, CHANNELS)
            own = WindowAttention(CHANNELS, HEADS, window, uses_global_queries, path)
            own.load_state_dict(exact.state_dict())
            # The reference starts from the same rounded values: what is left is the path's own error.
            got = differentiate(own.to(device, dtype), *(x.to(device, dtype) for x in maps))
            exact.load_state_dict(own.state_dict())
            wanted = differentiate(
                exact.to(device, torch.float64), *(x.to(dtype).to(device, torch.float64) for x in maps)
            )
            for ours, reference in zip(got, wanted, strict=True):
                worst = max(worst, relative_error(ours, reference))
    return worst


def relative_error(got: Tensor, wanted: Tensor) -> float:
    error = torch.linalg.vector_norm(got.detach().double() - wanted.detach()) / torch.linalg.vector_norm(
        wanted.detach()
    )
    return error.item() if error.isfinite() else float("inf")


def differentiate(attention: WindowAttention, x: Tensor, queries: Tensor) -> list[Tensor]:
    """Compute the output, and its gradients by the map, the global queries if they matter, and all parameters."""
    wanted = [x.requires_grad_(), *([queries.requires_grad_()] if attention.uses_global_queries else [])]
    out = attention(x, queries)
    torch.manual_seed(0)
    direction = torch.randn(out.shape).to(out)  # drawn on the CPU in fp32: alike for all
    return [out, *torch.autograd.grad(out, [*wanted, *attention.parameters()], direction)]
