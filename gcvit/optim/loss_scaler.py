"""Scale the loss in fp16, so that small gradients do not underflow, and adapt the scale to refused updates."""

import torch
from torch import Tensor

_FIRST_SCALE = 2.0**16
_UPDATES_BEFORE_DOUBLING = 2000


class LossScale:
    """Double the scale after 2000 applied updates in a row, halve it after a refused one. The host never reads it."""

    def __init__(self, device: torch.device):
        self.value = torch.tensor(_FIRST_SCALE, dtype=torch.float32, device=device)  # [], changed in place
        self._updates = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, applied: Tensor) -> None:
        """Adapt the scale to an update; `applied`, [] with 1.0 or 0.0, is the same on all ranks."""
        # The kernel of PyTorch's own GradScaler; it never doubles beyond what fp32 can hold.
        torch._amp_update_scale_(self.value, self._updates, 1.0 - applied, 2.0, 0.5, _UPDATES_BEFORE_DOUBLING)

    def get(self) -> tuple[float, int]:
        """Return the scale and the number of applied updates since it last changed. Waits for the device."""
        return self.value.item(), int(self._updates.item())

    def set(self, scale: float, updates: int) -> None:
        """Set what `get` returns."""
        self.value.fill_(scale)
        self._updates.fill_(updates)
