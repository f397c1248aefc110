"""Golden runs give the losses, gradient norms and final tensors that stand in `golden_bits.json`, to the bit.

In the environment of the record; in another, losses and norms to 1e-5. A change that is meant to alter the numbers
makes the record anew: `python -m tests.helpers.golden_bits --out tests/helpers/golden_bits.json` (two minutes).
"""

import json
import warnings

import pytest

from tests.helpers.golden_bits import (
    RECORD,
    RTOL,
    WORLD_SIZES,
    describe_environment,
    find_differences,
    make_runs,
)
from tests.helpers.golden_runs import make_images


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads(RECORD.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_runs_repeat_the_record(world_size, record, tmp_path):
    here, there = describe_environment(), record["environment"]
    others = [f"{name} {here.get(name)}, not {there[name]}" for name in there if here.get(name) != there[name]]
    if others:
        differing = "; ".join(others)
        warnings.warn(f"compared with rtol {RTOL:g}, not to the bit: environment differs: {differing}", stacklevel=1)
    make_images(tmp_path / "images")
    made = make_runs(world_size, tmp_path / "images", tmp_path)
    wanted = {tag: run for tag, run in record["runs"].items() if tag.endswith(f"-{world_size}")}
    differences = find_differences(made, wanted, exact=not others)
    assert not differences, "\n".join(differences)
