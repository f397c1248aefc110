"""A stage timer gives each moment to the stage that was switched to last, whatever the order of switches."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcvit.data.stage_timer import StageTimer

STAGES = st.sampled_from([None, "storage", "decoding", "collation"])


@given(st.lists(st.tuples(STAGES, st.floats(0.001, 100), st.booleans())))
def test_each_moment_is_one_stage_s(switches):
    """By a clock that the test moves: to each stage, then on; and now and then what has added up is taken."""
    now, watch, right = 50.0, StageTimer(), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: now)
        before = None
        for stage, seconds, takes in switches:
            assert watch.switch(stage) == before
            now, before = now + seconds, stage
            if stage is not None:
                right[stage] = right.get(stage, 0.0) + seconds
            if takes:
                assert without_zeros(watch.pop_seconds()) == pytest.approx(right)
                right = {}
        assert without_zeros(watch.pop_seconds()) == pytest.approx(right)


def without_zeros(seconds: dict[str, float]) -> dict[str, float]:
    return {stage: spent for stage, spent in seconds.items() if spent}


def test_a_stage_goes_on_when_its_time_is_taken():
    now, watch = 0.0, StageTimer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: now)
        watch.switch("decoding")
        now = 2.0
        assert watch.pop_seconds() == {"decoding": 2.0}
        now = 5.0
        assert watch.pop_seconds() == {"decoding": 3.0}
