"""benchmarks/checkpoint_index.py, on few ranks."""

import json

from tests.helpers.launching import python, succeed


def test_it_measures_and_meets_its_bars(tmp_path):
    file = tmp_path / "result.json"
    told = succeed(python("-m", "benchmarks.checkpoint_index", "--quick", "--check", "--json", file)).stdout
    assert "All bars are met." in told
    result = json.loads(file.read_text())
    assert result["ranks"] == 8
    assert 8 < result["tensors"] < result["ranges"] <= 8 * result["tensors"]
