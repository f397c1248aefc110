"""The index: which rank's file holds which elements of a tensor."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from gcvit.checkpoint import format
from gcvit.checkpoint.index import Ranges, merge_ranges


def test_a_step_has_one_spelling():
    assert format.step_dir(12) == "step_00000012"
    assert format.step_dir(123456789) == "step_123456789"


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9), data=st.data())
def test_pieces_are_what_was_asked_for(lengths, data):
    """Whatever ranges the ranks wrote, in whatever order: the pieces together are [start, stop), once."""
    total = sum(lengths)
    whole = list(range(total))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    order = data.draw(st.permutations(range(len(lengths))))
    ranges = merge_ranges([Ranges.pack(["w"], [(total,)], [starts[i]], [lengths[i]]) for i in order])["w"]["ranges"]
    held = [whole[starts[i] : starts[i] + lengths[i]] for i in order]
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, total)] * 2)))
    pieces = format.find_pieces(ranges, start, stop)
    assert [x for rank, begin, end in pieces for x in held[rank][begin:end]] == whole[start:stop]


@pytest.mark.parametrize("rows", [[(0, 3)], [(0, 3), (2, 4)], [(0, 2), (3, 3)], [(1, 5)], [(0, 7)]])
def test_ranges_that_are_no_partition_are_a_bug(rows):
    with pytest.raises(AssertionError):
        merge_ranges([Ranges.pack(["w"], [(2, 3)], [start], [length]) for start, length in rows])


@pytest.mark.parametrize(
    ("order", "length_of_last", "ranges"),
    [
        ([0, 1, 2, 3], 5, [[0, 0, 5, 4, 1]]),  # FSDP2, and the replicas of DDP
        ([0, 1, 2, 3], 2, [[0, 0, 5, 3, 1], [3, 15, 2, 1, 1]]),  # whose last rank has less
        ([0, 2, 1, 3], 5, [[0, 0, 5, 2, 2], [1, 10, 5, 2, 2]]),  # HSDP: two replicas of two shards
        ([3, 2, 1, 0], 5, [[3, 0, 5, 4, -1]]),
    ],
)
def test_equal_ranges_take_one_row(order, length_of_last, ranges):
    lengths = [5, 5, 5, length_of_last]
    of_ranks = [
        Ranges.pack(["w"], [(sum(lengths),)], [5 * order.index(r)], [lengths[order.index(r)]]) for r in range(4)
    ]
    assert merge_ranges(of_ranks) == {"w": {"shape": [sum(lengths)], "ranges": ranges}}


def test_safetensors_reads_what_follows_the_header():
    values = torch.arange(5.0)
    found = load(format.encode_header({"a": 3, "b": 2}) + values.numpy().tobytes())
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a": [0, 1, 2], "b": [3, 4]}


def test_the_state_is_readable_and_every_byte_counts():
    index = format.encode_index({"w": {"shape": [2], "ranges": [[0, 0, 2, 1, 1]]}, "v": {"shape": [], "ranges": []}})
    encoded = format.encode_state({"format": 3, "files": {"a": {"bytes": 1}, "b": {"bytes": 2}}}, index)
    assert b'\n "w": {"shape": [2], "ranges": [[0, 0, 2, 1, 1]]},\n' in encoded, "a line for each tensor"
    content, is_intact = format.decode_state(encoded)
    assert is_intact
    assert content | {"sha256": ""} == json.loads(encoded) | {"sha256": ""}
    for place in range(len(encoded)):
        changed = encoded[:place] + bytes([encoded[place] ^ 1]) + encoded[place + 1 :]
        try:
            _, is_intact = format.decode_state(changed)
        except (ValueError, KeyError):
            continue
        assert not is_intact, changed
