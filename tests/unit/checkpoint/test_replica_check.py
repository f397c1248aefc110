"""Replicas that differ by a single bit are found, and named; equal ones never."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from gcvit.checkpoint import replica_check
from gcvit.checkpoint.replica_check import check_replicas, digest_tensors
from gcvit.errors import UserError
from gcvit.parallel.engine import Fragment, Fragments


@pytest.fixture(autouse=True, params=[1 << 20, 4])
def chunk(request, monkeypatch) -> None:
    """Also in chunks that every tensor here has several of."""
    monkeypatch.setattr(replica_check, "_CHUNK", request.param)


@given(
    numel=st.integers(1, 40),
    place=st.integers(0, 10**6),
    bit=st.integers(0, 31),
    seed=st.integers(0, 99),
)
def test_any_bit_of_any_element_counts(numel, place, bit, seed):
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    changed = tensor.clone()
    word = changed.view(torch.int32)
    word[place % numel] ^= torch.tensor(1, dtype=torch.int32) << bit
    (one,), (other,) = digest_tensors([tensor]), digest_tensors([changed])
    assert one != other


@given(numel=st.integers(2, 40), one=st.integers(0, 10**6), other=st.integers(0, 10**6))
@example(numel=14, one=8, other=2)  # in two chunks, where the multipliers were equal once
def test_the_order_of_elements_counts(numel, one, other):
    tensor = torch.arange(float(numel))
    swapped = tensor.clone()
    swapped[[one % numel, other % numel]] = tensor[[other % numel, one % numel]]
    assert (digest_tensors([tensor]) == digest_tensors([swapped])) == (one % numel == other % numel)


@given(numel=st.integers(1, 40), offset=st.integers(0, 3))
def test_where_it_lies_in_memory_does_not_count(numel, offset):
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    memory = torch.zeros(numel + offset)
    memory[offset:] = tensor
    assert digest_tensors([memory[offset:]]) == digest_tensors([tensor])


# ---- between ranks -------------------------------------------------------------------------------


@dataclass
class Meeting:
    """What the ranks of a world of threads tell each other."""

    size: int
    told: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=60)


@dataclass
class ThreadWorld:
    """One rank of it: as much of a `World` as is asked here."""

    rank: int
    meeting: Meeting

    def gather(self, value: Any) -> list[Any]:
        self.meeting.told[self.rank] = value
        self.meeting.barrier.wait()
        told = [self.meeting.told[rank] for rank in range(self.meeting.size)]
        self.meeting.barrier.wait()
        return told


def check_all(tensors_of: Callable[[int], dict[str, Fragments]], size: int) -> list[str | None]:
    """What each rank's check says."""
    meeting, said = Meeting(size), [None] * size

    def check(rank: int) -> None:
        try:
            check_replicas(tensors_of(rank), ThreadWorld(rank, meeting))  # type: ignore[arg-type]
        except UserError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=check, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def held(seed: int, shard: int, replica: int, num_replicas: int) -> dict[str, Fragments]:
    generator = torch.Generator().manual_seed(seed + shard)
    return {
        kind: {
            name: Fragment(torch.randn(9, generator=generator), 9 * shard, torch.Size([18]), replica, num_replicas)
            for name in ("stem.weight", "head.weight", "head.bias")
        }
        for kind in ("model", "exp_avg")
    }


def flip_lowest_bit(fragment: Fragment) -> None:
    fragment.data.view(torch.int32)[4] ^= 1


@pytest.mark.parametrize("size", [1, 2, 3])
def test_equal_replicas(size):
    assert check_all(lambda rank: held(0, 0, rank, size), size) == [None] * size


def test_a_bit_on_one_rank_stops_all():
    def tensors_of(rank: int) -> dict[str, Fragments]:
        tensors = held(0, 0, rank, 3)
        if rank == 2:
            flip_lowest_bit(tensors["exp_avg"]["head.weight"])
        return tensors

    said = check_all(tensors_of, 3)
    assert len(set(said)) == 1
    message = said[0] or ""
    assert message.startswith("replicas of the model have diverged: got other bits on rank 2 than on rank 0 in exp_avg")
    assert "exp_avg.head.weight;" in message
    assert "hint: nothing was written" in message


def test_shards_differ_but_their_replicas_do_not():
    """HSDP on 2 x 2: ranks 0 and 2 hold the first half, 1 and 3 the second."""
    assert check_all(lambda rank: held(0, rank % 2, rank // 2, 2), 4) == [None] * 4

    def tensors_of(rank: int) -> dict[str, Fragments]:
        tensors = held(0, rank % 2, rank // 2, 2)
        if rank == 3:
            for part in tensors["model"].values():
                flip_lowest_bit(part)
            flip_lowest_bit(tensors["exp_avg"]["stem.weight"])
        return tensors

    for message in check_all(tensors_of, 4):
        assert message is not None
        names = "model.stem.weight, model.head.weight, model.head.bias and 1 more"
        assert f"rank 3 than on rank 1 in {names}" in message


def test_what_is_no_replica_is_not_compared():
    """ZeRO's and FSDP's shards: every rank has its own."""
    assert check_all(lambda rank: held(rank, rank, 0, 1), 2) == [None, None]
