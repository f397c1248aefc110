"""Simulate a device that runs out of memory, as only a GPU does."""

from typing import Any

import torch

from gcvit.planning.step_trace import Recorder


class Limited(Recorder):
    """Raise PyTorch's error for a GPU without memory after tensors exceed `limit` bytes, while entered."""

    def __init__(self, limit: float):
        super().__init__(set())
        self.limit, self.total, self.num_seen, self.num_failures = limit, 0, 0, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(op, types, args, kwargs)
        self.total += sum(event.num_bytes for event in self.events[self.num_seen :])
        self.num_seen = len(self.events)
        if self.total > self.limit:
            self.num_failures += 1
            raise torch.OutOfMemoryError("injected")
        return out
