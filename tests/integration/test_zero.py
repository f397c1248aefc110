"""Engine zero on 2 processes: refused updates, offloading and further keys of DeepSpeed, to the bit."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launching import succeed, torchrun
from tests.integration.zero_worker import BAD_STEP, NUM_STEPS, RUNS

pytestmark = pytest.mark.dist

each_run = pytest.mark.parametrize("name", RUNS)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, Any]:
    """What `zero_worker.py` says of each run."""
    out = tmp_path_factory.mktemp("zero") / "report.json"
    succeed(torchrun(2, Path(__file__).with_name("zero_worker.py"), out, timeout=300))
    return json.loads(out.read_text())


@each_run
def test_a_gradient_that_is_not_finite_on_one_rank_is_refused_on_all(name, report):
    run = report[name] or pytest.skip("no fp16 on this machine")
    for step in range(NUM_STEPS):
        assert run["applied"][step] == ([0.0, 0.0] if step == BAD_STEP else [1.0, 1.0])
    assert run["updates"] == [[1, 1], [1, 1], [2, 2]]


@each_run
def test_a_refused_update_leaves_no_trace(name, report):
    """Of masters and moments, nor of the weights that are computed with; the updates before and after do."""
    run = report[name] or pytest.skip("no fp16 on this machine")
    for what in ("held", "computed"):
        for rank in range(2):
            before, refused, after = (run[what][step][rank] for step in range(NUM_STEPS))
            assert refused == before
            assert after != refused


@pytest.mark.parametrize("name", [name for name in RUNS if name.endswith(("offloaded", "extra"))])
def test_offloading_and_further_keys_change_no_bit(name, report):
    plain, other = report[name.rsplit(" ", 1)[0]], report[name] or pytest.skip("no fp16 on this machine")
    for what in ("losses", "applied", "updates", "held", "computed", "average"):
        assert other[what] == plain[what], what
    for norm, expected in zip(other["norms"], plain["norms"], strict=True):
        assert norm == (None if expected is None else pytest.approx(expected, rel=1e-6))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_average_is_computed_with_and_is_not_the_last_weights(precision, report):
    for stage in (1, 2, 3):
        run = report[f"zero{stage} {precision}"]
        assert run["average"] != run["computed"][-1]


def test_linear_layers_of_others_are_left_alone(report):
    """DeepSpeed's default replaces PyTorch's function in the whole process."""
    assert report["linear is torch's"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_is_near_fp32_and_its_scale_is_halved_by_a_refused_update(stage, report):
    run, exact = report[f"zero{stage} fp16"] or pytest.skip("no fp16 on this machine"), report[f"zero{stage} fp32"]
    assert run["scales"] == [[2.0**16] * 2, [2.0**15] * 2, [2.0**15] * 2]
    for what in ("losses", "norms"):
        for step in (0, 2):
            assert run[what][step] == pytest.approx(exact[what][step], rel=1e-3)
            assert run[what][step] != exact[what][step]
