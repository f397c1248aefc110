"""Norms of single parameters and gradients: of shards of 2 processes they are those of one process's whole tensors."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.launching import succeed, torchrun
from tests.helpers.norms_worker import ENGINES, NUM_STEPS

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, dict]:
    """What `norms_worker.py` says of each engine."""
    out = tmp_path_factory.mktemp("norms") / "report.json"
    succeed(torchrun(2, Path(__file__).parents[1] / "helpers/norms_worker.py", out, timeout=300))
    return json.loads(out.read_text())


@pytest.mark.parametrize("engine", ENGINES)
def test_shards_have_the_norms_of_the_whole(engine, report):
    truth = report["ddp"]["truth"]
    assert len(truth) == 2 * NUM_STEPS
    for shown in report[engine]["shown"]:
        assert [row[:2] for row in shown] == [row[:2] for row in truth]
        for (step, kind, found), (*_, wanted) in zip(shown, truth, strict=True):
            assert list(found) == list(wanted)
            for stage, norms in wanted.items():
                # Key biases have no gradient but rounding noise.
                np.testing.assert_allclose(
                    found[stage], norms, rtol=1e-3, atol=1e-5, err_msg=f"step {step} {kind} {stage}"
                )


def test_gradients_were_clipped(report):
    """Else this would prove less: what is shown is from before."""
    for step, kind, norms in report["ddp"]["truth"]:
        whole = np.sqrt(sum(norm**2 for stage in norms.values() for norm in stage))
        assert kind == "parameter_norms" or whole > 0.6, step
