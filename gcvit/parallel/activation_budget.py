"""Choose the parts to checkpoint so that the activations of a micro-batch fit into a given memory."""

import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gcvit.errors import UserError
from gcvit.model import GCViT
from gcvit.parallel.activation_checkpointing import recompute
from gcvit.runtime.distributed import World

_NUM_RUNS = 5


@dataclass(frozen=True)
class Compute:
    """Describe how an engine computes: its device, its precision, and whether it uses autocast over fp32 weights."""

    device: torch.device
    dtype: torch.dtype
    autocast: bool

    @property
    def weights_dtype(self) -> torch.dtype:
        return torch.float32 if self.autocast else self.dtype

    def context(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.autocast and self.dtype != torch.float32)


# The milliseconds of a forward pass, from a part on meta, the shapes and types of its inputs, and how it computes.
Cost = Callable[[nn.Module, Iterable[tuple[torch.Size, torch.dtype]], Compute], float]


@dataclass(frozen=True)
class Part:
    """Hold a cut point, and what checkpointing it frees and costs."""

    name: str
    num_bytes: int  # stored by it for backward, of one micro-batch
    milliseconds: float  # to compute it again


@dataclass(frozen=True)
class Choice:
    """Hold the cut points to checkpoint, in the order of choice, and the bytes that a micro-batch then stores."""

    names: list[str]
    num_bytes: int
    description: str


class StorageTracker(TorchDispatchMode):
    """Record, while entered, the storage of every input and output of an operation, except those of `excluded`."""

    def __init__(self, excluded: Iterable[Tensor]):
        super().__init__()
        self._excluded = {address_of(tensor) for tensor in excluded}
        # In the order in which they appear. A weak reference keeps the address, not the memory, so none comes twice.
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, Tensor):
                address, storage = address_of(tensor), tensor.untyped_storage()
                if address not in self._excluded and address not in self._seen:
                    self._seen[address] = StorageWeakRef(storage), storage.nbytes()
        return out

    @property
    def num_seen(self) -> int:
        return len(self._seen)

    def bytes_alive(self, start: int = 0, stop: int | None = None, without: int | None = None) -> int:
        """Sum the bytes of recorded storages that are still alive, from the `start`-th to before the `stop`-th.

        Args:
            without: The `address_of` a tensor whose storage does not count.
        """
        found = list(self._seen.items())[start:stop]
        return sum(n for address, (storage, n) in found if address != without and not storage.expired())


def address_of(tensor: Tensor) -> int:
    """Return the address of a tensor's storage object: the same for all views."""
    return tensor.untyped_storage()._cdata


def choose_parts(
    model: GCViT, compute: Compute, num_images: int, budget_bytes: int, cost: Cost | None = None
) -> Choice:
    """Choose just enough parts of a model on meta for `num_images` at once, by bytes freed per millisecond.

    Args:
        cost: Replaces the measured time of a part, if there is no device to measure on.

    Raises:
        UserError: if all parts together do not free enough.
    """
    parts, num_bytes = measure_parts(model, compute, num_images, cost)
    order = sorted((p for p in parts if p.num_bytes), key=lambda p: p.num_bytes / p.milliseconds, reverse=True)
    names = [part.name for part in order]
    # The sum of their bytes is a close estimate. It misses the queries that checkpointed blocks store.
    count, estimate = 0, num_bytes
    while num_bytes > budget_bytes and count < len(order):
        while count < len(order) and estimate > budget_bytes:
            estimate -= order[count].num_bytes
            count += 1
        num_bytes = activation_bytes(model, names[:count], compute, num_images)
        estimate = num_bytes
    if num_bytes > budget_bytes:
        raise UserError(
            f"the activations of {num_images} images do not fit, with all parts of the model checkpointed",
            got=f"{num_bytes:,} bytes",
            expected=f"activation_budget_bytes={budget_bytes}",
            hint="lower trainer.micro_batch_size, or raise activation_budget_bytes",
        )
    milliseconds = sum(part.milliseconds for part in order[:count])
    description = (
        f"activation checkpointing of {count} of {len(parts)} parts: {num_bytes / 1e6:,.1f} MB of activations "
        f"for {num_images} images within {budget_bytes / 1e6:,.1f} MB, {milliseconds:.0f} ms more per micro-step"
    )
    return Choice(names[:count], num_bytes, description)


def recompute_within(budget_bytes: int, model: GCViT, compute: Compute, num_images: int, world: World) -> str:
    """Checkpoint the parts that rank 0 chooses, on all ranks, and return a description of the choice.

    Times differ from run to run, and so may the choice. It never changes a result.

    Raises:
        UserError: as `choose_parts` does.
    """
    choice = world.on_rank0(lambda: choose_parts(model, compute, num_images, budget_bytes))
    recompute(model, choice.names)
    return choice.description


def activation_bytes(model: GCViT, names: Sequence[str], compute: Compute, num_images: int) -> int:
    """Compute the bytes of activations after a training forward pass, with the parts `names` checkpointed."""
    model = copy.deepcopy(model)
    recompute(model, names)
    with _imagine(model, compute, num_images) as (tracker, forward):
        _logits = forward()
        return tracker.bytes_alive()


def measure_parts(model: GCViT, compute: Compute, num_images: int, cost: Cost | None = None) -> tuple[list[Part], int]:
    """Measure all cut points of a model on meta, in forward order, and the bytes of the whole.

    Parts of the same kind, shapes and inputs are timed once.
    """
    spans: dict[str, _Span] = {}
    watched = copy.deepcopy(model)
    with _imagine(watched, compute, num_images) as (tracker, forward):
        for name in watched.cut_points():
            part = watched.get_submodule(name)
            part.forward = functools.partial(_watch, part.forward, tracker, spans, name)
        _logits = forward()
        num_bytes = {name: tracker.bytes_alive(span.start, span.stop, span.output) for name, span in spans.items()}
        whole = tracker.bytes_alive()
    milliseconds: dict[Any, float] = {}
    parts = []
    for name, span in spans.items():
        part = model.get_submodule(name)
        kind = (type(part), tuple(p.shape for p in part.parameters()), span.inputs, span.out_shape)
        if kind not in milliseconds:
            milliseconds[kind] = (cost or _time_forward)(part, span.inputs, compute)
        parts.append(Part(name, num_bytes[name], milliseconds[kind]))
    return parts, whole


class _Span(NamedTuple):
    """Hold what the forward pass of one part allocated, its inputs and its output."""

    start: int  # in the order of the tracker's storages
    stop: int
    output: int  # the address of its storage
    inputs: tuple[tuple[torch.Size, torch.dtype], ...]
    out_shape: torch.Size


def _watch(
    forward: Callable[..., Tensor], tracker: StorageTracker, spans: dict[str, _Span], name: str, *inputs: Tensor
) -> Tensor:
    start = tracker.num_seen
    out = forward(*inputs)
    taken = tuple((x.shape, x.dtype) for x in inputs)
    spans[name] = _Span(start, tracker.num_seen, address_of(out), taken, out.shape)
    return out


@contextmanager
def _imagine(model: GCViT, compute: Compute, num_images: int) -> Iterator[tuple[StorageTracker, Callable[[], Tensor]]]:
    """Prepare a training forward pass as on the device, but with tensors without memory, and its tracker."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights: dict[str, Tensor] = {
            name: nn.Parameter(torch.empty(p.shape, dtype=compute.weights_dtype, device=compute.device))
            for name, p in model.named_parameters()
        }
        with StorageTracker(weights.values()) as tracker, compute.context():
            # The tracker must see them before the first part does: that part does not free them.
            images = torch.empty(num_images, *model.input_size, dtype=compute.weights_dtype, device=compute.device)
            yield tracker, lambda: torch.func.functional_call(model.train(), weights, (images,))


def _time_forward(part: nn.Module, inputs: Iterable[tuple[torch.Size, torch.dtype]], compute: Compute) -> float:
    """Measure the milliseconds of a part's forward pass on the real device: the median of a few. It is on meta."""
    part = copy.deepcopy(part).to(compute.weights_dtype).to_empty(device=compute.device).train()
    for p in part.parameters():
        nn.init.constant_(p, 0.01)  # uninitialized memory may hold values that are slow to compute with
    tensors = [torch.full(shape, 0.5, dtype=dtype, device=compute.device) for shape, dtype in inputs]
    on_gpu = compute.device.type == "cuda"
    times = []
    # Drop path draws random numbers, which must not change those of the run.
    with torch.random.fork_rng(devices=[compute.device] if on_gpu else []), compute.context():
        for _ in range(1 + _NUM_RUNS):
            if on_gpu:
                torch.cuda.synchronize(compute.device)
            start = time.perf_counter()
            part(*tensors)
            if on_gpu:
                torch.cuda.synchronize(compute.device)
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])
