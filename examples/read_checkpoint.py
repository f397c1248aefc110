"""Read a tensor of a checkpoint with safetensors and NumPy: `python examples/read_checkpoint.py CHECKPOINT NAME`."""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open


def read_tensor(checkpoint: Path, name: str) -> np.ndarray:
    """Read a whole fp32 tensor; its name begins with its kind: "ema.head.weight", "exp_avg.head.weight"."""
    stored = json.loads((checkpoint / "state.json").read_text())["tensors"][name]
    whole = np.empty(stored["shape"], np.float32)
    for rank, start, length in stored["ranges"]:
        with safe_open(checkpoint / f"rank_{rank:05d}.safetensors", "numpy") as file:
            whole.reshape(-1)[start : start + length] = file.get_tensor(name)
    return whole


if __name__ == "__main__":
    print(read_tensor(Path(sys.argv[1]), sys.argv[2]))
