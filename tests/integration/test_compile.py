"""torch.compile part by part: no graph breaks, and nothing is compiled again once there was a step and an evaluation.

With each kind of activation checkpointing, and with each kind of engine in real processes.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.launching import succeed, torchrun
from tests.integration.compile_worker import NUM_ROUNDS, RUNS

pytestmark = pytest.mark.dist


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_parts_are_compiled_whole_and_once(name, tmp_path):
    """ddp in one process, the engines that shard in two."""
    out, num_processes = tmp_path / "report.json", 1 if name.startswith("ddp") else 2
    succeed(torchrun(num_processes, Path(__file__).with_name("compile_worker.py"), out, name, timeout=290))
    run = json.loads(out.read_text())[name]
    assert run["breaks"] == {}
    # The golden model has 16 cut points, and training has other graphs than evaluation. Two more blocks of a kind that
    # is there add one: block 0 is never dropped, and has no drop path to share with block 2. Blocks 1 and 3 share all.
    num_graphs = 2 * 16 + (name == "ddp deeper")
    assert run["graphs"] == [num_graphs] * NUM_ROUNDS
    np.testing.assert_allclose(run["compiled losses"], run["losses"], rtol=1e-5)
