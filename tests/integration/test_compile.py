"""torch.compile part by part: no graph breaks, and nothing is compiled again once there was a step and an evaluation.

With each kind of activation checkpointing, and with each kind of engine in real processes.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.integration.compile_worker import NUM_ROUNDS, RUNS
from tests.integration.launching import succeed, torchrun

ALONE = [name for name in RUNS if name.startswith("ddp")]
TOGETHER = [name for name in RUNS if name not in ALONE]


def launch(names: list[str], num_processes: int, folder: Path) -> dict[str, dict]:
    out = folder / "report.json"
    succeed(torchrun(num_processes, Path(__file__).with_name("compile_worker.py"), out, *names, timeout=300))
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, dict]:
    """What `compile_worker.py` says of each run: ddp in one process, the engines that shard in two."""
    alone = launch(ALONE, 1, tmp_path_factory.mktemp("alone"))
    return alone | launch(TOGETHER, 2, tmp_path_factory.mktemp("together"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_parts_are_compiled_whole_and_once(name, report):
    run = report[name]
    assert run["breaks"] == {}
    # The golden model has 16 cut points; at least each has a graph, and training another one than evaluation.
    assert run["graphs"][0] >= 2 * 16
    assert run["graphs"] == run["graphs"][:1] * NUM_ROUNDS
    np.testing.assert_allclose(run["compiled losses"], run["losses"], rtol=1e-5)
