"""The benchmark of engines: it counts what is there, and names what misses a bar."""

import copy
import json

import pytest

from benchmarks.engines_bytes import find_missed_bytes, find_missed_traffic
from tests.helpers.launching import python, succeed


@pytest.mark.slow
def test_bytes_and_traffic_of_ddp_and_fsdp_are_the_theory_s(tmp_path):
    """By a tiny model on two processes; a byte too many, or one sent twice, would be told."""
    file = tmp_path / "results.json"
    words = ["--quick", "--only", "bytes,traffic", "--engines", "ddp,fsdp", "--json", file, "--check"]
    done = succeed(python("-m", "benchmarks.engines", *words))
    assert "All bars are met." in done.stdout
    results = json.loads(file.read_text())
    held, sent = results["bytes"], results["traffic"]
    assert set(held["engines"]) == set(sent["engines"]) == {"ddp", "fsdp"}
    for name in ("ddp", "fsdp"):
        worse = copy.deepcopy(held)
        worse["engines"][name]["ranks"][1]["moments"] *= 1.2
        assert [miss for miss in find_missed_bytes(worse) if name in miss and "moments" in miss]
        worse = copy.deepcopy(sent)
        calls = worse["engines"][name]["2"]["ranks"][0]["sent"]
        calls["allreduce"] = calls.get("allreduce", 0) + held["weights_bytes"] / 2
        assert len(find_missed_traffic(worse)) == 1
