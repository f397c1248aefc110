"""Which parts to checkpoint so that a micro-batch's activations fit a given memory: exact bytes, measured times."""

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
    """How an engine computes: on which device, in which precision, and whether by autocast over fp32 weights."""

    device: torch.device
    dtype: torch.dtype
    autocast: bool

    @property
    def weights_dtype(self) -> torch.dtype:
        return torch.float32 if self.autocast else self.dtype

    def context(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.autocast and self.dtype != torch.float32)


# Of a part on meta, its inputs' shapes and types, and how it computes: what forward takes.
Cost = Callable[[nn.Module, Iterable[tuple[torch.Size, torch.dtype]], Compute], float]


@dataclass(frozen=True)
class Part:
    """A cut point, and what checkpointing it frees and costs."""

    name: str
    num_bytes: int  # stored by it for backward, of one micro-batch
    milliseconds: float  # to compute it again


@dataclass(frozen=True)
class Choice:
    """Cut points to checkpoint, in the order in which they were chosen, and what a micro-batch then stores."""

    names: list[str]
    num_bytes: int
    description: str


class StorageTracker(TorchDispatchMode):
    """While entered, notes the memory behind every tensor that an operation takes or gives; `excluded` apart."""

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
        """Bytes of what was seen, from the `start`-th to before the `stop`-th, and is still there.

        `without` is an `address_of` something that does not count.
        """
        found = list(self._seen.items())[start:stop]
        return sum(n for address, (storage, n) in found if address != without and not storage.expired())


def address_of(tensor: Tensor) -> int:
    """Of the record of its memory: the same for all views."""
    return tensor.untyped_storage()._cdata


def choose_parts(
    model: GCViT, compute: Compute, num_images: int, budget_bytes: int, cost: Cost | None = None
) -> Choice:
    """Just enough parts of a model on meta for `num_images` at once, by bytes freed per millisecond.

    `cost` stands in for the measured time of a part, where there is no device to measure on. Errors: UserError where
    all parts together are not enough.
    """
    parts, num_bytes = measure_parts(model, compute, num_images, cost)
    order = sorted((p for p in parts if p.num_bytes), key=lambda p: p.num_bytes / p.milliseconds, reverse=True)
    names = [part.name for part in order]
    # Their bytes, taken off, say almost how many it takes; what remains to be told is the queries that blocks keep.
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
    """Checkpoint what rank 0 chooses, on all ranks alike, and say what it is. Errors: as `choose_parts`.

    Times differ from run to run, and so may the choice: it never changes what is computed.
    """
    choice = world.on_rank0(lambda: choose_parts(model, compute, num_images, budget_bytes))
    recompute(model, choice.names)
    return choice.description


def activation_bytes(model: GCViT, names: Sequence[str], compute: Compute, num_images: int) -> int:
    """What is alive after a training forward pass of a model on meta, with these parts checkpointed; weights apart."""
    model = copy.deepcopy(model)
    recompute(model, names)
    with _imagine(model, compute, num_images) as (tracker, forward):
        _logits = forward()
        return tracker.bytes_alive()


def measure_parts(model: GCViT, compute: Compute, num_images: int, cost: Cost | None = None) -> tuple[list[Part], int]:
    """All cut points of a model on meta, in forward order, and the bytes of the whole; times are taken by kind."""
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
    """What a part did: the memory that it was the first to use, and what it took and gave."""

    start: int  # of what the tracker has seen
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
    """A training forward pass as it would be on its device, but of tensors without memory, and what tracks it."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights: dict[str, Tensor] = {
            name: nn.Parameter(torch.empty(p.shape, dtype=compute.weights_dtype, device=compute.device))
            for name, p in model.named_parameters()
        }
        with StorageTracker(weights.values()) as tracker, compute.context():
            # Made in sight of the tracker: else they would count as the first part's, which does not free them.
            images = torch.empty(num_images, *model.input_size, dtype=compute.weights_dtype, device=compute.device)
            yield tracker, lambda: torch.func.functional_call(model.train(), weights, (images,))


def _time_forward(part: nn.Module, inputs: Iterable[tuple[torch.Size, torch.dtype]], compute: Compute) -> float:
    """Milliseconds of a part's forward pass on the real device, the median of a few; the part is on meta."""
    part = copy.deepcopy(part).to(compute.weights_dtype).to_empty(device=compute.device).train()
    for p in part.parameters():
        nn.init.constant_(p, 0.01)  # what lies in fresh memory may be slow to compute with
    tensors = [torch.full(shape, 0.5, dtype=dtype, device=compute.device) for shape, dtype in inputs]
    on_gpu = compute.device.type == "cuda"
    times = []
    # Drop path draws random numbers, of which the run must not feel anything.
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
