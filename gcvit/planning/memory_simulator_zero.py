"""The memory of engine zero, simulated as in `memory_simulator.py`: what DeepSpeed 0.19.8 holds, gathers and copies."""

import math
from collections import Counter, defaultdict, deque

import torch

from gcvit.config.schema import Config, ZeroConfig
from gcvit.optim.adamw import Group, find_group
from gcvit.parallel.deepspeed_config import build_settings
from gcvit.planning.memory_simulator import FP32, Layout, SimulatedStep
from gcvit.planning.step_trace import ROOT


class SimulatedZero(SimulatedStep):
    """Simulate what the stages share: fp32 masters and moments are sharded, gradients are sent in buckets."""

    def __init__(self, config: Config, layout: Layout, world_size: int, num_micro_steps: int, on_gpu: bool):
        super().__init__(config, layout, world_size, num_micro_steps, on_gpu)
        self.zero = config.zero or ZeroConfig()
        settings = build_settings(config.optim, self.zero, layout.model, num_micro_steps, self.dtype)[
            "zero_optimization"
        ]
        self.bucket_elements: int = settings["reduce_bucket_size"]
        self.overlaps: bool = on_gpu and (self.zero.extra or {}).get("zero_optimization", {}).get("overlap_comm", True)
        self.settings = settings
        self.in_bucket: list[str] = []
        self.num_in_bucket = 0

    def hold_share(self, share: float) -> None:
        """Allocate masters, moments and EMA of so many bytes each."""
        if self.zero.offload_optimizer is None:
            self.hold(parameters=share, moments=2 * share, ema=share)

    def share_on_host(self, share: float) -> float:
        """Return the bytes of masters, moments, EMA and gradients on the host, if they are offloaded."""
        return (5 if self.config.ema else 4) * share if self.zero.offload_optimizer else 0

    def fill_bucket(self, name: str) -> None:
        """Copy a gradient into the bucket, which is sent first if it has no room."""
        numel = self.layout.numel[name]
        if self.in_bucket and self.num_in_bucket + numel > self.bucket_elements:
            self.send_bucket()
        self.in_bucket.append(name)
        self.num_in_bucket += numel
        self.allocate("gradients", self.own_bytes(name))

    def own_bytes(self, name: str) -> int:
        """Return the bytes of a gradient larger than the bucket, which is not copied; 0 for others."""
        numel = self.layout.numel[name]
        return self.size_of * numel if numel > self.bucket_elements else 0

    def send_bucket(self) -> None:
        for name in self.in_bucket:
            self.allocate("gradients", -self.own_bytes(name))
        self.in_bucket.clear()
        self.num_in_bucket = 0


class SimulatedZero12(SimulatedZero):
    """Simulate stages 1 and 2: weights are replicated, each group of the optimizer is flat and sharded."""

    def __init__(self, config: Config, layout: Layout, world_size: int, num_micro_steps: int, on_gpu: bool):
        super().__init__(config, layout, world_size, num_micro_steps, on_gpu)
        groups: dict[Group, list[int]] = defaultdict(list)
        for name, shape in layout.shapes.items():
            groups[find_group(name, tuple(shape), config.optim, layout.layers)].append(shape.numel())
        self.shares = [math.ceil(sum(sizes) / world_size) for sizes in groups.values()]
        # The last rank's gradients come first; parameters that end in its share are kept whole.
        self.kept_elements = sum(_count_from(sizes, (world_size - 1) / world_size) for sizes in groups.values())
        # In lower precision gradients are added to a flat fp32 share of their own.
        self.has_flat_sum = self.dtype != torch.float32
        self.whole: dict[str, int] = {}  # stage 1's gradients until they are exchanged
        self.has_share = False  # of the gradients
        self.bucket_bytes = 0

    def begin(self) -> None:
        self.allocate("parameters", self.size_of * self.layout.num_parameters)
        self.hold_share(FP32 * sum(self.shares))

    def host_bytes(self) -> int:
        return round(self.share_on_host(FP32 * sum(self.shares)))

    def on_backward(self, part: str) -> None:
        if part == ROOT:
            # Stage 1 sums in fp32 before it sends.
            size = FP32 if self.zero.stage == 1 else self.size_of
            self.bucket_bytes = (2 if self.overlaps else 1) * size * self.bucket_elements
            self.allocate("gathered", self.bucket_bytes)

    def on_gradient(self, name: str) -> None:
        if self.zero.stage == 1:
            if name not in self.whole:
                self.whole[name] = FP32 * self.layout.numel[name]
                self.allocate("gradients", self.whole[name])
            if self.is_last and self.overlaps:
                self._exchange(name)
        else:
            self.fill_bucket(name)

    def on_end(self, _: str) -> None:
        if self.zero.stage == 1 and self.is_last:
            for name in list(self.whole):
                self._exchange(name)
        if self.in_bucket:
            self.send_bucket()
        self.allocate("gathered", -self.bucket_bytes)
        # Another micro-step's share is summed to the first one's at the end.
        self.has_share = self.has_flat_sum

    def _exchange(self, name: str) -> None:
        self.fill_bucket(name)
        self.allocate("gradients", -self.whole.pop(name))

    def send_bucket(self) -> None:
        if self.dtype != torch.float32 and self.zero.stage == 2:  # summed in fp32
            self.allocate_temporarily("gathered", FP32 * self.num_in_bucket)
        if not self.has_share and self.zero.offload_optimizer is None:
            self.has_share = True
            self.allocate("gradients", FP32 * (sum(self.shares) if self.has_flat_sum else self.kept_elements))
        super().send_bucket()

    def update(self) -> None:
        if self.has_flat_sum or self.zero.offload_optimizer:
            return
        if self.zero.stage == 2 and self.num_micro_steps > 1:  # the last ones are in the sum
            self.allocate("gradients", -FP32 * self.kept_elements)
        self.allocate_temporarily("gradients", FP32 * max(self.shares))  # flattened, group by group


def _count_from(sizes: list[int], place: float) -> int:
    """Count the elements of the parameters that end beyond this fraction of the total."""
    start, total, count = place * sum(sizes), 0, 0
    for size in sizes:
        total += size
        count += size if total > start else 0
    return count


class SimulatedZero3(SimulatedZero):
    """Simulate stage 3: each parameter is sharded flat; parts are gathered before their use, some parameters ahead."""

    def __init__(self, config: Config, layout: Layout, world_size: int, num_micro_steps: int, on_gpu: bool):
        super().__init__(config, layout, world_size, num_micro_steps, on_gpu)
        self.padded = sum(self._pad(name) for name in layout.shapes)
        self.available: set[str] = set()
        self.arriving: list[list[str]] = []  # messages
        self.num_present = 0  # elements of both
        self.ahead: deque[str] = deque()  # parameters in the order of their use
        self.expected: Counter[str] = Counter()  # how many uses of a parameter were removed from `ahead`
        self.used: Counter[str] = Counter()

    def begin(self) -> None:
        share = FP32 * self.padded / self.world_size
        if self.zero.offload_parameters is None:
            self.allocate("parameters", self.size_of * self.padded / self.world_size)
        self.hold_share(share)
        self.allocate("gradients", share if self.zero.offload_optimizer is None else 0)
        self.allocate("gathered", FP32 * self.bucket_elements)

    def host_bytes(self) -> int:
        offloaded = self.size_of * self.padded / self.world_size if self.zero.offload_parameters else 0
        return round(offloaded + self.share_on_host(FP32 * self.padded / self.world_size))

    def on_forward(self, part: str) -> None:
        if part == ROOT:
            parts = self.layout.parts
            self.ahead = deque(name for part in (*parts, *reversed(parts)) for name in self.layout.names[part])
            self.expected.clear()
            self.used.clear()
        else:
            self._fetch(part)

    def on_forwarded(self, part: str) -> None:
        self._release(part)

    def on_loss(self, _: str) -> None:
        self._fetch(ROOT)
        self._release(ROOT)

    def on_backward(self, part: str) -> None:
        self._fetch(part)

    def on_backwarded(self, part: str) -> None:
        self._release(part)

    def on_gradient(self, name: str) -> None:
        self.fill_bucket(name)

    def on_end(self, _: str) -> None:
        if self.in_bucket:
            self.send_bucket()
        for part in self.layout.parts:
            self._release(part)

    def send_bucket(self) -> None:
        num_bytes = FP32 * sum(map(self._pad, self.in_bucket))
        # Laid out by rank, after a cast if they are not fp32.
        self.allocate_temporarily("gathered", num_bytes * (1 if self.dtype == torch.float32 else 2))
        super().send_bucket()

    def _fetch(self, part: str) -> None:
        names, arriving = self.layout.names[part], set().union(*self.arriving)
        missing = {name for name in names if name not in self.available}
        self._start_gather([name for name in names if name in missing and name not in arriving])
        for message in [message for message in self.arriving if missing.intersection(message)]:
            self.allocate("gathered", self.size_of * sum(self.layout.numel[name] for name in message))
            self.allocate("gathered", -self.size_of * sum(map(self._pad, message)))
            self.available.update(message)
            self.arriving.remove(message)
        for name in names:
            self.used[name] += 1
            if self.expected[name] < self.used[name]:
                self.ahead.remove(name)
                self.expected[name] += 1
        # Each module within a part gathers more, so that this limit decides.
        room = self.settings["stage3_max_live_parameters"] - self.num_present
        present, chosen = self.available.union(*self.arriving), []
        while self.ahead and room > 0:
            name = self.ahead.popleft()
            self.expected[name] += 1
            if name not in present:
                present.add(name)
                chosen.append(name)
                room -= self.layout.numel[name]
        self._start_gather(chosen)

    def _start_gather(self, names: list[str]) -> None:
        if names:
            self.arriving.append(names)
            self.num_present += sum(self.layout.numel[name] for name in names)
            self.allocate("gathered", self.size_of * sum(map(self._pad, names)))

    def _release(self, part: str) -> None:
        for name in self.layout.names[part]:
            # A parameter that is expected again is not freed: the gathers ahead skipped it.
            if name in self.available and self.expected[name] <= self.used[name]:
                self.available.remove(name)
                self.num_present -= self.layout.numel[name]
                self.allocate("gathered", -self.size_of * self.layout.numel[name])

    def _pad(self, name: str) -> int:
        return -(-self.layout.numel[name] // self.world_size) * self.world_size
