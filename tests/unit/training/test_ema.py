"""The moving average: right, the same however it is cut, and swapped in and out without a trace."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gcvit.config.schema import EmaConfig
from gcvit.errors import Preempted
from gcvit.optim.lr_schedule import to_samples
from gcvit.parallel.engine import Fragment, Fragments
from gcvit.training.ema import Ema

SHAPES = {"a": torch.Size([13, 7]), "b": torch.Size([1]), "c": torch.Size([40])}


@dataclass
class Refreshed:
    """What `swapped_in` needs of an engine."""

    count: int = 0

    def refresh(self) -> None:
        self.count += 1


def cut(weights: dict[str, torch.Tensor], cuts: dict[str, list[int]]) -> list[Fragments]:
    """One set of fragments, views of `weights`, for each rank; a rank may hold nothing of a tensor."""
    ranks: list[Fragments] = [{} for _ in range(4)]
    for name, whole in weights.items():
        places = [0, *sorted(cuts[name]), whole.numel()]
        for rank, (start, stop) in enumerate(itertools.pairwise(places)):
            if stop > start:
                ranks[rank][name] = Fragment(whole.view(-1)[start:stop], start, SHAPES[name])
    return ranks


def draw_cuts(shape: torch.Size) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, shape.numel()), min_size=3, max_size=3)


@given(
    cuts=st.fixed_dictionaries({name: draw_cuts(shape) for name, shape in SHAPES.items()}),
    seed=st.integers(0, 1000),
    half_life=st.sampled_from([1.0, 50.0, 1e5]),
)
def test_a_sharded_average_is_the_unsharded_one_to_the_bit(cuts, seed, half_life):
    generator = torch.Generator().manual_seed(seed)
    whole = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    sharded = {name: tensor.clone() for name, tensor in whole.items()}
    settings = {"half_life_samples": half_life, "global_batch_size": 8}
    one = Ema(cut(whole, {name: [0, 0, 0] for name in SHAPES})[3], **settings)
    many = [Ema(fragments, **settings) for fragments in cut(sharded, cuts) if fragments]
    for _ in range(4):
        for name in SHAPES:
            change = torch.randn(SHAPES[name], generator=generator)
            whole[name] += change
            sharded[name] += change
        for ema in (one, *many):
            ema.update()
    for name, shape in SHAPES.items():
        parts = [ema.fragments[name] for ema in many if name in ema.fragments]
        joined = torch.cat([part.data for part in sorted(parts, key=lambda part: part.start)])
        assert torch.equal(joined.view(shape), one.fragments[name].data.view(shape))


def single(value: float = 0.0, half_life: float = 100, batch: int = 10) -> tuple[torch.Tensor, Ema]:
    weights = torch.full((3,), value)
    fragments = {"w": Fragment(weights, 0, weights.shape)}
    return weights, Ema(fragments, half_life_samples=half_life, global_batch_size=batch)


@pytest.mark.parametrize("batch", [1, 10, 50])
def test_after_a_half_life_the_old_weights_count_half(batch):
    weights, ema = single(1.0, half_life=100, batch=batch)
    weights.zero_()
    for _ in range(100 // batch):
        ema.update()
    torch.testing.assert_close(ema.fragments["w"].data, torch.full((3,), 0.5))
    assert ema.updates == 100 // batch


def test_the_default_is_the_published_decay():
    length = {"global_batch_size": 1024, "samples_per_epoch": 1_281_167}
    half_life = to_samples(EmaConfig().half_life, **length)
    _, ema = single(half_life=half_life, batch=1024)
    assert ema.decay == pytest.approx(0.9998, abs=1e-7)
    assert half_life / 1024 == pytest.approx(math.log(0.5) / math.log(0.9998), rel=1e-3)


def test_the_average_begins_at_the_weights_and_is_a_copy():
    weights, ema = single(2.0)
    weights.fill_(5)
    assert ema.fragments["w"].data.tolist() == [2, 2, 2]
    ema.update()
    ema.restart()
    assert ema.fragments["w"].data.tolist() == [5, 5, 5]
    assert ema.updates == 0


@given(seed=st.integers(0, 1000))
def test_swapping_in_and_out_restores_every_bit(seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    fragments = {name: Fragment(tensor.view(-1), 0, tensor.shape) for name, tensor in weights.items()}
    ema = Ema(fragments, half_life_samples=3, global_batch_size=1)
    for tensor in weights.values():
        tensor.mul_(1.3)
    ema.update()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    average = {name: part.data.clone() for name, part in ema.fragments.items()}
    engine = Refreshed()
    with ema.swapped_in(engine):
        assert engine.count == 1
        assert all(torch.equal(weights[name].view(-1), average[name]) for name in SHAPES)
    assert engine.count == 2
    assert all(torch.equal(weights[name], before[name]) for name in SHAPES)
    assert all(torch.equal(ema.fragments[name].data, average[name]) for name in SHAPES)


def test_an_error_inside_starts_no_collective():
    """To refresh is one with zero: this rank would wait there for others, which are inside another."""
    weights, ema = single(1.0)
    weights.fill_(4)
    engine = Refreshed()
    with pytest.raises(RuntimeError), ema.swapped_in(engine):  # noqa: PT012
        assert weights.tolist() == [1, 1, 1]
        raise RuntimeError("a sample that cannot be read, say")
    assert engine.count == 1


def test_an_evaluation_that_is_left_swaps_back():
    """All ranks leave it alike, and save what they trained."""
    weights, ema = single(1.0)
    weights.fill_(4)
    engine = Refreshed()
    with pytest.raises(Preempted), ema.swapped_in(engine):
        raise Preempted
    assert weights.tolist() == [4, 4, 4]
    assert engine.count == 2
