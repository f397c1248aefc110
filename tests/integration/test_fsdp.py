"""Engine fsdp on 4 processes: replicas of shards, offloading, precisions, and what is sent when."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.launching import succeed, torchrun

pytestmark = pytest.mark.dist

RUNS = ["ddp", "fsdp", "hsdp", "hsdp keeping", "fsdp offloaded", "hsdp offloaded", "fsdp summing in bf16"]
HALF = ["ddp fp16", "hsdp fp16"]
HSDP = [name for name in (*RUNS, *HALF) if name.startswith("hsdp")]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, dict]:
    """What `fsdp_worker.py` says of each run."""
    out = tmp_path_factory.mktemp("fsdp") / "report.json"
    succeed(torchrun(4, Path(__file__).with_name("fsdp_worker.py"), out, timeout=300))
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", ["fsdp", "hsdp", "hsdp keeping", "fsdp offloaded", "hsdp offloaded"])
def test_sharding_changes_no_number(name, report):
    ddp, sharded = report["ddp"], report[name]
    np.testing.assert_allclose(sharded["losses"], ddp["losses"], rtol=1e-6)
    np.testing.assert_allclose(sharded["norms"], ddp["norms"], rtol=1e-6)


@pytest.mark.parametrize("name", [*RUNS, *HALF])
def test_the_norm_and_the_loss_scale_are_equal_on_all_ranks(name, report):
    for of_ranks in (*report[name]["norms"], *report[name]["scales"]):
        assert len(of_ranks) == 4
        assert len(set(of_ranks)) == 1


@pytest.mark.parametrize("name", HSDP)
def test_replicas_are_equal_to_the_bit(name, report):
    digests = report[name]["digests"]
    assert digests[:2] == digests[2:]
    assert digests[0] != digests[1]


@pytest.mark.parametrize("plain", ["fsdp", "hsdp"])
def test_offloading_changes_no_bit(plain, report):
    """Nor does a shard size of all ranks, which the offloaded fsdp has."""
    for key in ("losses", "norms", "digests"):
        assert report[plain][key] == report[f"{plain} offloaded"][key]


@pytest.mark.parametrize("name", [*RUNS, *HALF])
def test_fragments_of_each_replica_cover_each_tensor_once(name, report):
    num_replicas = {"ddp": 4, "hsdp": 2, "fsdp": 1}[name.split()[0]]
    places: dict[tuple[str, int], list[tuple[int, int]]] = {}
    sizes = {}
    for of_rank in report[name]["parts"]:
        for tensor, start, numel, whole, replica, replicas in of_rank:
            assert replicas == num_replicas
            places.setdefault((tensor, replica), []).append((start, start + numel))
            sizes[tensor] = whole
    assert places.keys() == {(tensor, replica) for tensor in sizes for replica in range(num_replicas)}
    for (tensor, _), ranges in places.items():
        cuts = sorted(ranges)
        assert [0, *(stop for _, stop in cuts)] == [*(start for start, _ in cuts), sizes[tensor]], tensor


@pytest.mark.parametrize("name", [*RUNS, *HALF])
def test_gradients_are_sent_in_the_last_micro_step_alone(name, report):
    reductions = {"ddp": {"allreduce"}, "fsdp": {"reduce_scatter"}, "hsdp": {"allreduce", "reduce_scatter"}}
    expected = reductions[name.split()[0]]
    traffic = report[name]["traffic"]
    assert len(traffic) == 6
    for micro_step, counts in enumerate(traffic):
        sent = {kind for kind in ("allreduce", "reduce_scatter") if any(kind in op for op in counts)}
        assert sent == (expected if micro_step % 2 else set())


def test_gathered_parameters_that_are_kept_are_not_sent_again(report):
    for name, gathers in (("hsdp", True), ("hsdp keeping", False)):
        for counts in report[name]["traffic"]:
            assert any("allgather" in op for op in counts) == gathers


def test_sums_in_bf16_are_near_and_rounded(report):
    exact, rounded = report["fsdp"], report["fsdp summing in bf16"]
    np.testing.assert_allclose(rounded["norms"], exact["norms"], rtol=1e-2)
    assert all(one != other for one, other in zip(rounded["norms"], exact["norms"], strict=True))


@pytest.mark.parametrize("name", HALF)
def test_fp16_is_near_fp32_and_not_fp32(name, report):
    exact, half = report["ddp"], report[name]
    np.testing.assert_allclose(half["losses"], exact["losses"], rtol=1e-3)
    np.testing.assert_allclose(half["norms"], exact["norms"], rtol=1e-2)
    assert all(one != other for one, other in zip(half["losses"], exact["losses"], strict=True))


def test_a_shard_size_that_does_not_divide_is_refused(report):
    assert "fsdp.shard_size" in report["refusal"]
    assert "got 3" in report["refusal"]
