"""What a forecast makes of records: the most that fits, even splits, and engines by their names."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcvit.config.load import load_config
from gcvit.data.batch_plan import BatchPlan
from gcvit.planning.memory_predictor import Forecast, condense, engine_name, with_engine
from gcvit.planning.step_trace import Event
from tests.helpers.launching import ROOT

CONFIG = load_config(ROOT / "tests/helpers/golden.yaml")[0]
FORECAST = Forecast(CONFIG, on_gpu=False)


@given(
    pairs=st.integers(1, 300),
    world_size=st.integers(1, 9),
    limit=st.integers(0, 3000),
    accumulating=st.integers(0, 500),
)
def test_the_largest_micro_batch_fits_and_the_next_one_does_not(pairs, world_size, limit, accumulating):
    """Of an image's byte each, and some more where micro-steps are summed."""
    config = CONFIG.model_copy(update={"global_batch_size": 2 * pairs})

    def predict(_, world_size, num_images):
        steps = BatchPlan(2 * pairs, world_size, num_images, paired=True).num_micro_steps
        return SimpleNamespace(peak=num_images + (accumulating if steps > 1 else 0))

    forecast = Forecast.__new__(Forecast)
    forecast.predict = predict  # type: ignore[method-assign]
    most = forecast.largest(config, world_size, limit)
    fitting = [n for n in range(2, limit + 1, 2) if predict(config, world_size, n).peak <= limit]
    assert most == max(fitting, default=0)


@given(st.lists(st.integers(-9, 9) | st.just("mark"), max_size=40))
def test_between_two_marks_only_the_rise_and_the_end_count(steps):
    """Peaks and ends of every stretch stay."""
    marks = [(i, Event(0, "forward", str(i))) for i, step in enumerate(steps) if step == "mark"]
    found = condense(np.array([0 if step == "mark" else step for step in steps], dtype=np.int64), marks)

    def stretches(numbers):
        total, peak = 0, 0
        for number in numbers:
            if number is None:
                yield peak, total
                peak = total
            else:
                total += number
                peak = max(peak, total)
        yield peak, total

    wanted = stretches([None if step == "mark" else step for step in steps])
    assert list(stretches([None if event.what else event.num_bytes for event in found])) == list(wanted)
    assert [event.name for event in found if event.what] == [mark.name for _, mark in marks]


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_an_engine_is_called_by_its_name(name):
    assert engine_name(with_engine(CONFIG, name), 16) == name


def test_shards_within_nodes_and_offloading_have_names_too():
    hsdp = with_engine(CONFIG, "hsdp")
    assert (engine_name(hsdp, 16), engine_name(hsdp, 8)) == ("hsdp", "fsdp")
    path = ROOT / "tests/helpers/golden.yaml"
    for words, name in (
        (["engine=fsdp", "fsdp.cpu_offload=true"], "fsdp+offload"),
        (["engine=zero", "zero.stage=3", "zero.offload_parameters=cpu"], "zero3+offload"),
    ):
        assert engine_name(load_config(path, words)[0], 2) == name
