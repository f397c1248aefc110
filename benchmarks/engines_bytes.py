"""Measure the bytes that an engine holds and sends, beside the theory of its kind. Used by `benchmarks.engines`.

The bytes held are those of every distinct storage behind the tensors of a process. The storages are found through the
garbage collector and through the engine's attributes. Each counts once, under the first category that claims it.

The bytes sent are those of every collective that reaches PyTorch's dispatcher, whoever calls it, if the collective goes
around in a ring of N ranks. For an input of n bytes of all ranks together, an all-gather and a reduce-scatter send
(N-1)/N n. A broadcast and a reduce send as much on average over the ranks, and an all-reduce twice as much.
"""

import gc
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.engines_crew import SHARDS_OF_HSDP, Crew, Training, make_config
from gcvit.model.from_config import build_model
from gcvit.optim.adamw import EXP_AVG, EXP_AVG_SQ, MODEL

MICRO_STEPS = (1, 2)
MARGIN = 0.10  # of the theory, either way
CATEGORIES = ("parameters", "masters", "gradients", "moments", "EMA", "buckets", "gathered", "other")


# ---- what it holds -------------------------------------------------------------------------------


def resident_in_theory(name: str, weights: int, world_size: int) -> dict[str, float]:
    """Compute the bytes by category of a rank after its backward passes, in fp32; a category that is absent has 0.

    ddp's gradients are views of its buckets, so they take no memory of their own. ZeRO has masters beside the
    parameters in fp32 too. Stage 1 has whole gradients while it computes them, and its share after they are summed.
    """
    share = weights / (SHARDS_OF_HSDP if name == "hsdp" else world_size)
    match name:
        case "ddp":
            return {"parameters": weights, "gradients": weights, "moments": 2 * weights, "EMA": weights}
        case "fsdp" | "hsdp":
            return {"parameters": share, "gradients": share, "moments": 2 * share, "EMA": share}
        case "zero1" | "zero2":
            held = {"parameters": weights, "gradients": share}
        case "zero3":
            held = {"parameters": share, "gradients": share}
        case _:
            raise AssertionError(name)
    return held | {"masters": share, "moments": 2 * share, "EMA": share}


def count_resident(training: Training) -> dict[str, Any]:
    """Count the bytes of this rank by category between backward and step; list the names of tensors in "other"."""
    training.step()  # some memory is taken at the first
    training.backward()
    training.synchronize()
    gc.collect()
    warnings.simplefilter("ignore", FutureWarning)  # of deprecated things that are met on the way
    claimed: dict[int, str] = {}
    sizes: dict[int, int] = {}
    others: dict[str, int] = {}

    def claim(category: str, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in claimed:
                claimed[storage._cdata] = category
                sizes[storage._cdata] = storage.nbytes()

    engine, fragments = training.engine, training.engine.fragments()
    claim("input", [training.images, training.targets])
    claim("EMA", (part.data for part in training.ema.fragments.values()))
    claim("moments", (part.data for kind in (EXP_AVG, EXP_AVG_SQ) for part in fragments[kind].values()))
    parameters = list(engine.module.parameters())
    claim("parameters", (_held(p) for p in parameters))
    claim("masters", (part.data for part in fragments[MODEL].values()))
    claim("gathered", (p.data for p in parameters if not isinstance(p, DTensor)))
    claim("gathered", _gathered_by_fsdp(engine.module))
    claim("gradients", (_local(p.grad) for p in parameters if p.grad is not None))
    for path, tensor in _walk(engine):
        claim("gradients" if "grad" in path else "buckets" if "bucket" in path else "other", [tensor])
    claim("other", (_local(x) for x in gc.get_objects() if isinstance(x, Tensor) and not x.is_meta))
    for path, tensor in _walk(engine):
        if claimed[tensor.untyped_storage()._cdata] == "other":
            others[path] = tensor.untyped_storage().nbytes()
    found = dict.fromkeys(CATEGORIES, 0)
    for address, category in claimed.items():
        if category != "input":
            found[category] += sizes[address]
    training.update()
    return {"bytes": found, "others": others}


def _held(p: Tensor) -> Tensor:
    """Return the part of a parameter that this rank holds between uses."""
    shard: Tensor = getattr(p, "ds_tensor", _local(p))
    return shard


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gathered_by_fsdp(module: torch.nn.Module) -> Iterator[Tensor]:
    for group in _fsdp_groups(module):
        for p in group.fsdp_params:
            yield from p.all_gather_outputs


def _fsdp_groups(module: torch.nn.Module) -> Iterator[Any]:
    # The parts of a unit share its state.
    for state in {part._get_fsdp_state() for part in module.modules() if isinstance(part, FSDPModule)}:
        yield from state._fsdp_param_groups


def _walk(root: object) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that can be reached from an object by attributes, keys and places, with its path."""
    seen, waiting = {id(root)}, [("", root)]
    while waiting:
        path, thing = waiting.pop()
        if isinstance(thing, Tensor):
            if not thing.is_meta:
                yield path, _local(thing)
            children: Iterable[tuple[Any, Any]] = [("grad", thing.grad)] if thing.is_leaf else []
        elif isinstance(thing, dict):
            children = thing.items()
        elif isinstance(thing, (list, tuple, set)):
            children = enumerate(thing)
        else:
            children = getattr(thing, "__dict__", {}).items() if not isinstance(thing, type) else []
        for key, child in children:
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append((f"{path}.{key}" if isinstance(key, (str, int)) else path, child))


def measure_bytes(crews: dict[str, Crew], quick: bool) -> dict[str, Any]:
    """Measure the bytes by category of each rank, beside those of the theory, by engine."""
    sizes, world_size = tensor_bytes(quick), len(next(iter(crews.values())))
    rows = {}
    for name, crew in crews.items():
        ranks = crew.call(count_resident)
        theory = resident_in_theory(name, sum(sizes), world_size)
        rows[name] = {"ranks": [rank["bytes"] for rank in ranks], "theory": theory, "others": ranks[0]["others"]}
    return {"weights_bytes": sum(sizes), "largest_bytes": max(sizes), "engines": rows}


def tensor_bytes(quick: bool) -> list[int]:
    """Compute the bytes of each parameter of the crews' model, in fp32."""
    with torch.device("meta"):
        model = build_model(make_config("ddp", 1, quick).model)
    return [4 * p.numel() for p in model.parameters()]


def find_missed_bytes(result: dict[str, Any]) -> list[str]:
    """Describe the misses of the theory, in total and of each of its categories."""
    missed = []
    for name, row in result["engines"].items():
        for rank, found in enumerate(row["ranks"]):
            pairs = {category: (found[category], held) for category, held in row["theory"].items()}
            pairs["all"] = sum(found.values()), sum(row["theory"].values())
            missed += [
                f"bytes of {name}, rank {rank}, {category}: {held / 1e6:,.1f} MB, in theory {theory / 1e6:,.1f}"
                for category, (held, theory) in pairs.items()
                if held < (1 - MARGIN) * theory or held > (1 + MARGIN) * theory + _border(name, category, result)
            ]
    return missed


def _border(name: str, category: str, result: dict[str, Any]) -> float:
    """Return the bytes of the largest tensor for gradients of stages 1 and 2, else 0.

    These stages cut the gradients inside a tensor, all of which a rank then holds.
    """
    held_whole: float = result["largest_bytes"]
    return held_whole if name in ("zero1", "zero2") and category == "gradients" else 0


def print_bytes(result: dict[str, Any]) -> None:
    print(f"\nHeld between backward and step, MB of each rank; the weights are {result['weights_bytes'] / 1e6:,.1f} MB")
    print(f"{'':14}" + "".join(f"{category:>12}" for category in (*CATEGORIES, "all", "of theory")))
    for name, row in result["engines"].items():
        theory = sum(row["theory"].values())
        for rank, found in enumerate(row["ranks"]):
            share = sum(found.values()) / theory
            print(f"{name:8}{f'rank {rank}':6}{_cells(found)}{share:12.3f}")
        print(f"{'':8}theory{_cells(row['theory'])}")


def _cells(held: dict[str, float]) -> str:
    numbers = [*(held.get(category, 0) for category in CATEGORIES), sum(held.values())]
    return "".join(f"{number / 1e6:12,.1f}" for number in numbers)


# ---- what it sends -------------------------------------------------------------------------------


def traffic_in_theory(name: str, weights: int, world_size: int, num_micro_steps: int, kept: int = 0) -> float:
    """Compute the bytes that a rank sends in a step.

    ddp: gradients once, by all-reduce. fsdp and zero3: a gathering for forward and one for backward in each
    micro-step; fsdp gathers once the `kept` bytes of weights that stay from forward to backward. fsdp scatters
    the sum of gradients once, zero3 in each micro-step. zero1 reduces gradients once, zero2 in each micro-step, and
    both gather the updated parameters. By the paper (https://arxiv.org/abs/1910.02054, section 7) they would scatter
    the gradients, for half the bytes of the all-reduce that DeepSpeed 0.19.8 does; the theory here follows DeepSpeed.
    """
    once = weights * (world_size - 1) / world_size
    match name:
        case "ddp":
            return 2 * once
        case "fsdp":
            return (num_micro_steps * (2 - kept / weights) + 1) * once
        case "hsdp":
            replicas, shard = world_size // SHARDS_OF_HSDP, weights / SHARDS_OF_HSDP
            within = traffic_in_theory("fsdp", weights, SHARDS_OF_HSDP, num_micro_steps, kept)
            return within + 2 * shard * (replicas - 1) / replicas
        case "zero1":
            return (2 + 1) * once
        case "zero2":
            return (2 * num_micro_steps + 1) * once
        case "zero3":
            return 3 * num_micro_steps * once
    raise AssertionError(name)


class Traffic(TorchDispatchMode):
    """Count collectives, the bytes they send, and the bytes copied from tensor to tensor, while entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.copied = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            self._count(op._schema.name.removeprefix("c10d::").strip("_"), args)
        elif op._schema.name in ("aten::copy_", "aten::_foreach_copy_", "aten::cat", "aten::clone"):
            self.copied += _num_bytes(args[1] if "copy" in op._schema.name else args[0])
        return op(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name in ("barrier", "monitored_barrier"):
            return
        size = next(ProcessGroup.unbox(x).size() for x in args if isinstance(x, torch.ScriptObject) and _is_group(x))
        if name.startswith(("allgather", "_allgather")):
            num_bytes = _num_bytes(args[1]) * size  # every rank gives as much
            factor = 1
        elif name.startswith("allreduce"):
            num_bytes, factor = _num_bytes(args[0]), 2
        else:
            # Scattered or exchanged: what goes in. Broadcast and reduced: the one tensor there is.
            num_bytes = _num_bytes(args[0] if name in ("broadcast", "reduce") else args[1])
            factor = 1
        self.calls[name] += 1
        self.sent[name] += factor * num_bytes * (size - 1) // size


def _is_group(thing: torch.ScriptObject) -> bool:
    return thing._type().qualified_name().endswith("c10d.ProcessGroup")


def _num_bytes(tensors: Any) -> int:
    return sum(x.nbytes for x in tree_leaves(tensors) if isinstance(x, Tensor))


def count_traffic(training: Training, num_micro_steps: int) -> dict[str, Any]:
    """Count a rank's collectives and their bytes in one step, by kind, and the bytes that forward leaves gathered."""
    if num_micro_steps > 1:
        training = Training(training.config, training.world, num_micro_steps)
    training.step()  # engines learn the order of things in the first steps, with collectives of their own
    training.step()
    with Traffic() as traffic:
        training.step()
    training.synchronize()
    keeping = (group for group in _fsdp_groups(training.engine.module) if not group._reshard_after_forward)
    kept = sum(4 * p._orig_size.numel() for group in keeping for p in group.fsdp_params)
    return {"calls": dict(traffic.calls), "sent": dict(traffic.sent), "copied": traffic.copied, "kept": kept}


def measure_traffic(crews: dict[str, Crew], quick: bool) -> dict[str, Any]:
    """Measure the bytes that the first rank sends by kind of collective, and the theory, by engine and micro-steps."""
    weights, world_size = sum(tensor_bytes(quick)), len(next(iter(crews.values())))
    rows: dict[str, Any] = {}
    for name, crew in crews.items():
        rows[name] = {}
        for num_micro_steps in MICRO_STEPS:
            ranks = crew.call(count_traffic, num_micro_steps)
            theory = traffic_in_theory(name, weights, world_size, num_micro_steps, ranks[0]["kept"])
            rows[name][str(num_micro_steps)] = {"ranks": ranks, "theory": theory}
    return {"weights_bytes": weights, "engines": rows}


def find_missed_traffic(result: dict[str, Any]) -> list[str]:
    missed = []
    for name, by_steps in result["engines"].items():
        for num_micro_steps, row in by_steps.items():
            for rank, found in enumerate(row["ranks"]):
                sent, theory = sum(found["sent"].values()), row["theory"]
                if abs(sent - theory) > MARGIN * theory:
                    missed.append(
                        f"traffic of {name}, rank {rank}, {num_micro_steps} micro-steps: {sent / 1e6:,.1f} MB, "
                        f"in theory {theory / 1e6:,.1f}"
                    )
    return missed


def print_traffic(result: dict[str, Any]) -> None:
    print("\nSent by the first rank in a step, MB in a ring, and what is copied from tensor to tensor")
    print(f"{'':8}{'micro-steps':>12}{'sent':>9}{'theory':>9}{'ratio':>7}{'copied':>9}   collectives")
    for name, by_steps in result["engines"].items():
        for num_micro_steps, row in by_steps.items():
            found = row["ranks"][0]
            sent = sum(found["sent"].values())
            kinds = ", ".join(f"{n} {kind} {found['sent'][kind] / 1e6:,.1f}" for kind, n in found["calls"].items())
            cells = f"{sent / 1e6:9,.1f}{row['theory'] / 1e6:9,.1f}{sent / max(row['theory'], 1):7.2f}"
            print(f"{name:8}{num_micro_steps:>12}{cells}{found['copied'] / 1e6:9,.1f}   {kinds}")
