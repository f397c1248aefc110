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
    for rank, start, length, count, step in stored["ranges"]:
        for i in range(count):  # ranges of equal length follow each other, in the files of every step-th rank
            with safe_open(checkpoint / f"rank_{rank + i * step:05d}.safetensors", "numpy") as file:
                whole.reshape(-1)[start + i * length : start + (i + 1) * length] = file.get_tensor(name)
    return whole


if __name__ == "__main__":
    print(read_tensor(Path(sys.argv[1]), sys.argv[2]))
