"""examples/read_checkpoint.py, as people copy it: safetensors and NumPy are all that it needs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gcvit.checkpoint.store import RunState, save
from gcvit.parallel.engine import Fragment
from gcvit.runtime.distributed import join_world

EXAMPLE = Path(__file__).parents[3] / "examples/read_checkpoint.py"
CODE = """
import runpy, sys
from pathlib import Path
sys.modules.update(torch=None, gcvit=None)  # an import of either fails
read_tensor = runpy.run_path(sys.argv[1])["read_tensor"]
for name in ("model.head.weight", "ema.head.weight"):
    tensor = read_tensor(Path(sys.argv[2]), name)
    print(tensor.dtype, tensor.shape, tensor.flatten().tolist())
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    values = torch.arange(6.0)
    tensors = {
        kind: {"head.weight": Fragment(values * factor, 0, torch.Size([2, 3]))}
        for kind, factor in (("model", 1), ("ema", 2))
    }
    with join_world() as world:
        return save(tmp_path_factory.mktemp("example"), RunState(step=1), tensors, {"config": {}}, world)


def test_it_reads_whole_tensors(checkpoint):
    words = [sys.executable, "-c", CODE, str(EXAMPLE), str(checkpoint)]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == [f"float32 (2, 3) {[i * factor for i in (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)]}" for factor in (1, 2)]


def test_it_prints_one(checkpoint):
    words = [sys.executable, str(EXAMPLE), str(checkpoint), "model.head.weight"]
    told = subprocess.run(words, capture_output=True, text=True, check=True)
    assert told.stdout == "[[0. 1. 2.]\n [3. 4. 5.]]\n"


def test_it_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 30
