"""trainer.micro_batch_size=auto: the search, a real trial that runs out of memory, and what all ranks agree on."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gcvit.config.load import load_config
from gcvit.data.batch_plan import BatchPlan
from gcvit.errors import UserError
from gcvit.planning.micro_batch_finder import find_largest, resolve_micro_batch
from gcvit.runtime.distributed import World
from tests.helpers.launching import ROOT

AUTO = load_config(ROOT / "tests/helpers/golden.yaml", ["trainer.micro_batch_size=auto", "global_batch_size=24"])[0]


class Answers(World):
    """A world whose other ranks have found these."""

    others: tuple[int, ...] = ()

    def gather(self, value):
        return [value, *self.others]


def world_of(*others: int) -> World:
    world = Answers(0, 1 + len(others), torch.device("cpu"), None)  # type: ignore[arg-type]
    object.__setattr__(world, "others", others)
    return world


@given(pairs=st.integers(1, 400), world_size=st.integers(1, 9), limit=st.integers(0, 900))
def test_the_largest_that_fits_is_found_with_few_trials(pairs, world_size, limit):
    batch_plan = BatchPlan(2 * pairs, world_size, None, paired=True)
    unit, share = batch_plan.unit, batch_plan.largest_share
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    found = find_largest(batch_plan, fits)
    even = {-(-share // unit // steps) * unit for steps in range(1, share // unit + 1)}
    assert found == max((size for size in even if size <= limit), default=0)
    assert len(tried) <= 2 * (share // unit).bit_length() + 1
    assert all(size % unit == 0 for size in tried)


def test_all_ranks_take_the_smallest_answer(monkeypatch):
    monkeypatch.setattr(
        "gcvit.planning.micro_batch_finder.Trial", lambda *_: SimpleNamespace(fits=lambda n: n <= 8, end=lambda: None)
    )
    for others, wanted in (((8, 8), 8), ((4, 8), 4), ((), 8)):
        notices: list[str] = []
        config = resolve_micro_batch(AUTO, world_of(*others), None, notices)
        assert config.trainer.resolved_micro_batch_size == wanted
        assert config.global_batch_size == AUTO.global_batch_size
        assert f"auto: {wanted} of" in notices[0]
    with pytest.raises(UserError, match="not even the smallest micro-batch fits"):
        resolve_micro_batch(AUTO, world_of(0), None, [])


def test_a_number_is_left_alone_and_a_resumed_run_keeps_what_it_had(monkeypatch):
    monkeypatch.setattr(
        "gcvit.planning.micro_batch_finder.Trial", lambda *_: SimpleNamespace(fits=lambda n: n <= 8, end=lambda: None)
    )
    given = load_config(ROOT / "tests/helpers/golden.yaml", ["trainer.micro_batch_size=4"])[0]
    assert resolve_micro_batch(given, world_of(), None, []) is given
    tree = AUTO.model_dump(mode="json")
    tree["trainer"]["micro_batch_size"] = 6
    for world, wanted in ((world_of(), 6), (world_of(8), 6), (world_of(8, 8), 8)):
        notices: list[str] = []
        trained = {"world_size": min(world.size, 2), "config": tree}
        config = resolve_micro_batch(AUTO, world, trained, notices)
        assert config.trainer.resolved_micro_batch_size == wanted
        assert len(notices) == 1


def test_auto_and_a_budget_of_activations_are_refused():
    with pytest.raises(UserError, match="each follow the other"):
        load_config(
            ROOT / "tests/helpers/golden.yaml",
            ["trainer.micro_batch_size=auto", "activation_checkpointing=budget", "activation_budget_bytes=1000"],
        )
