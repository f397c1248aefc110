"""bf16 on 2 processes: near fp32 and not fp32, with fp32 masters and moments; recomputation changes no bit."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.launching import succeed, torchrun

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ENGINES = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
each_engine = pytest.mark.parametrize("engine", ENGINES)
each_precision = pytest.mark.parametrize("precision", ["fp32", "bf16"])


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, dict]:
    """What `bf16_worker.py` says of each "ENGINE PRECISION CHECKPOINTING"."""
    out = tmp_path_factory.mktemp("bf16") / "report.json"
    succeed(torchrun(2, Path(__file__).with_name("bf16_worker.py"), out, timeout=240))
    return json.loads(out.read_text())


@each_engine
def test_bf16_is_near_fp32_and_not_fp32(engine, report):
    fp32, bf16 = (report[f"{engine} {precision} none"] for precision in ("fp32", "bf16"))
    assert len(bf16["losses"]) == 3
    np.testing.assert_allclose(bf16["losses"], fp32["losses"], rtol=1e-2)
    np.testing.assert_allclose(bf16["norms"], fp32["norms"], rtol=5e-2)
    # Rounding to 8 bits leaves no step's loss as it was: were it so, the precision had not come through.
    assert all(one != other for one, other in zip(bf16["losses"], fp32["losses"], strict=True))


@each_engine
@each_precision
def test_recomputation_changes_no_bit(engine, precision, report):
    none, full = (report[f"{engine} {precision} {mode}"] for mode in ("none", "full"))
    assert full["losses"] == none["losses"]
    assert full["norms"] == none["norms"]
    assert full["digests"] == none["digests"]


@each_engine
@each_precision
def test_masters_and_moments_are_fp32(engine, precision, report):
    for mode in ("none", "full"):
        assert report[f"{engine} {precision} {mode}"]["dtypes"] == ["torch.float32"]


def test_ranks_hold_what_their_engine_says(report):
    """Equal copies with ddp, different parts with all others."""
    for engine in ENGINES:
        first, second = report[f"{engine} bf16 none"]["digests"]
        assert (first == second) == (engine == "ddp")


def test_stages_1_and_2_sum_alike(report):
    """Over micro-steps and ranks in fp32, also where DeepSpeed by itself would not."""
    for precision in ("fp32", "bf16"):
        first, second = (report[f"{engine} {precision} none"] for engine in ("zero1", "zero2"))
        np.testing.assert_allclose(first["losses"], second["losses"], rtol=1e-6)
        np.testing.assert_allclose(first["norms"], second["norms"], rtol=1e-6)
