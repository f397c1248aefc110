"""The factor of fp16's loss: it lifts small gradients above fp16's underflow, and follows what the updates survive."""

import torch
from torch import Tensor

_FIRST_SCALE = 2.0**16
_UPDATES_BEFORE_DOUBLING = 2000


class LossScale:
    """Doubled after 2000 applied updates in a row, halved by one that was refused; never read by the host."""

    def __init__(self, device: torch.device):
        self.value = torch.tensor(_FIRST_SCALE, dtype=torch.float32, device=device)  # [], changed in place
        self._updates = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, applied: Tensor) -> None:
        """Follow an update's outcome: `applied` is [], 1.0 or 0.0, the same on all ranks, so the scale is too."""
        # The kernel of PyTorch's own GradScaler; it never doubles beyond what fp32 can hold.
        torch._amp_update_scale_(self.value, self._updates, 1.0 - applied, 2.0, 0.5, _UPDATES_BEFORE_DOUBLING)

    def get(self) -> tuple[float, int]:
        """The scale, and the number of applied updates since it last changed; waits for the device."""
        return self.value.item(), int(self._updates.item())

    def set(self, scale: float, updates: int) -> None:
        self.value.fill_(scale)
        self._updates.fill_(updates)
