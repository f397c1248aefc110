"""Build the index of a run's checkpoints: the ranges of all ranks are merged once in a run, not at every save."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np

from gcvit.checkpoint.format import Index, encode_index
from gcvit.parallel.engine import Fragment
from gcvit.runtime.distributed import World


class Ranges(NamedTuple):
    """Pack the ranges that one rank writes, to send them. Many ranks share `tensors`, which is parsed once."""

    tensors: bytes  # JSON: [[name, shape], ...]
    starts: bytes  # int64
    lengths: bytes  # int64

    @classmethod
    def pack(
        cls, names: Iterable[str], shapes: Iterable[Sequence[int]], starts: Sequence[int], lengths: Sequence[int]
    ) -> Self:
        tensors = json.dumps(list(zip(names, map(list, shapes), strict=True))).encode()
        return cls(tensors, np.array(starts, np.int64).tobytes(), np.array(lengths, np.int64).tobytes())


class IndexCache:
    """Cache the encoded index, which stays the same as long as each rank holds the same ranges."""

    def __init__(self) -> None:
        self._ranges: Ranges | None = None
        self._encoded = ""

    def encode(self, own: Mapping[str, Fragment], world: World) -> str:
        """Merge the ranges of all ranks on rank 0, unless they are the same as in the call before.

        Returns:
            The encoded index on rank 0, and an empty text elsewhere.
        """
        parts = own.values()
        ranges = Ranges.pack(
            own, (part.shape for part in parts), [part.start for part in parts], [part.data.numel() for part in parts]
        )
        if any(world.gather(ranges != self._ranges)):
            of_ranks = world.gather_on_rank0(ranges)
            self._ranges = ranges
            self._encoded = encode_index(merge_ranges(of_ranks)) if world.is_rank0 else ""
        return self._encoded


def merge_ranges(of_ranks: Sequence[Ranges]) -> Index:
    """Merge the ranges that the ranks write into the index of the checkpoint.

    Raises:
        AssertionError: The ranges of a tensor overlap or leave a gap, which only a bug of an engine can cause.
    """
    shapes: dict[str, list[int]] = {}
    numbers: dict[bytes, np.ndarray] = {}  # of the tensors, by their JSON
    for one in of_ranks:
        if one.tensors not in numbers:
            new = json.loads(one.tensors)
            shapes.update(new)
            places = {name: number for number, name in enumerate(shapes)}
            numbers[one.tensors] = np.array([places[name] for name, _ in new], np.int64)
    tensor = np.concatenate([numbers[one.tensors] for one in of_ranks])
    rank = np.repeat(np.arange(len(of_ranks)), [len(numbers[one.tensors]) for one in of_ranks])
    start = np.frombuffer(b"".join(one.starts for one in of_ranks), np.int64)
    length = np.frombuffer(b"".join(one.lengths for one in of_ranks), np.int64)
    order = np.lexsort((start, tensor))
    bounds = np.searchsorted(tensor[order], np.arange(len(shapes) + 1))
    index: Index = {}
    for number, (name, shape) in enumerate(shapes.items()):
        here = order[bounds[number] : bounds[number + 1]]
        ends = np.cumsum(length[here])
        is_whole = ends[-1] == np.prod(shape, dtype=np.int64)
        is_partition = is_whole and start[here[0]] == 0 and np.array_equal(start[here[1:]], ends[:-1])
        assert is_partition, f"the ranges of {name} overlap or leave a gap"
        index[name] = {"shape": shape, "ranges": list(_join(rank[here], start[here], length[here]))}
    return index


def _join(rank: np.ndarray, start: np.ndarray, length: np.ndarray) -> Iterator[list[int]]:
    """Join ranges of equal length that follow each other, on ranks that are equally far apart."""
    first = 0
    while first < len(rank):
        count, step = 1, 1
        if first + 1 < len(rank):
            is_like = (length[first + 1 :] == length[first]) & (np.diff(rank[first:]) == rank[first + 1] - rank[first])
            num_like = len(is_like) if is_like.all() else int(is_like.argmin())
            if num_like:
                count, step = 1 + num_like, int(rank[first + 1] - rank[first])
        yield [int(rank[first]), int(start[first]), int(length[first]), count, step]
        first += count
