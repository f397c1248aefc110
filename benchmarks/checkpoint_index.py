"""What does a checkpoint's index cost? `python -m benchmarks.checkpoint_index [--quick] [--check] [--json FILE]`

512 simulated ranks hold GC ViT-L, its moments and its EMA as FSDP2 cuts them: rows of each parameter, in equal parts,
rounded up. What rank 0 does at the first save, when the ranges of all ranks have arrived, and what each rank does when
it resumes:

    merge   unpickle the ranges of all ranks, merge them, encode the index, write and flush `state.json`; bar: 2 s
    again   the same at a later save, which has the encoded index: encode and write
    open    read `state.json`, check its hash, parse it, find the sizes of 512 files; bar: 1 s
    find    look up the pieces that one rank of another world size (384) needs

The tensors are not written: every file is empty but for its size.
"""

import argparse
import json
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.engines_saves import conclude
from gcvit.checkpoint.format import (
    FORMAT,
    STATE_FILE,
    encode_index,
    encode_state,
    find_pieces,
    rank_file,
    write_file,
)
from gcvit.checkpoint.index import Ranges, merge_ranges
from gcvit.checkpoint.store import open_checkpoint
from gcvit.model import create_model

BARS = {"merge": 2.0, "open": 1.0}  # seconds, at most
KINDS = ("model", "exp_avg", "exp_avg_sq", "ema")
NUM_RANKS, OTHER_NUM_RANKS = 512, 384


def cut(shape: tuple[int, ...], rank: int, num_ranks: int) -> tuple[int, int]:
    """Cut the first dimension as FSDP2 does, and return start and length of a rank's range of the flattened tensor."""
    rows, row_size = (shape[0], torch.Size(shape[1:]).numel()) if shape else (1, 1)
    per_rank = -(-rows // num_ranks)
    first, last = min(rank * per_rank, rows), min((rank + 1) * per_rank, rows)
    return first * row_size, (last - first) * row_size


def list_ranges(shapes: dict[str, tuple[int, ...]], rank: int, num_ranks: int) -> Ranges:
    """List the ranges that a rank holds."""
    ranges = [(name, shape, *cut(shape, rank, num_ranks)) for name, shape in shapes.items()]
    names, shapes_, starts, lengths = zip(*(range_ for range_ in ranges if range_[3]), strict=True)
    return Ranges.pack(names, shapes_, starts, lengths)


def measure(num_ranks: int, repeats: int) -> dict[str, Any]:
    """Measure each part, and return the medians of its seconds with the size of its data."""
    with torch.device("meta"):
        model = create_model("gc_vit_large", num_classes=1000, img_size=224)
    shapes = {f"{kind}.{name}": tuple(p.shape) for kind in KINDS for name, p in model.named_parameters()}
    messages = [pickle.dumps(list_ranges(shapes, rank, num_ranks)) for rank in range(num_ranks)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        for rank in range(num_ranks):
            (path / rank_file(rank)).write_bytes(b"")
        record = {"bytes": 0, "sha256": "0" * 64}
        content = {"format": FORMAT, "state": {}, "files": {rank_file(rank): record for rank in range(num_ranks)}}

        def write(index: str) -> None:
            write_file(path / STATE_FILE, [memoryview(encode_state(content, index))], lambda: None)

        def merge() -> str:
            index = encode_index(merge_ranges([pickle.loads(message) for message in messages]))  # noqa: S301  (our own)
            write(index)
            return index

        def find() -> None:
            for name, shape in shapes.items():
                start, length = cut(shape, 0, OTHER_NUM_RANKS)
                pieces = find_pieces(found.index[name]["ranges"], start, start + length)
                assert sum(end - begin for _, begin, end in pieces) == length

        index, seconds = measure_one(merge, repeats)
        results = {"merge": seconds, "again": measure_one(lambda: write(index), repeats)[1]}
        found, results["open"] = measure_one(lambda: open_checkpoint(path), repeats)
        results["find"] = measure_one(find, repeats)[1]
        num_ranges = sum(cut(shape, rank, num_ranks)[1] > 0 for rank in range(num_ranks) for shape in shapes.values())
        size = {"ranks": num_ranks, "tensors": len(shapes), "ranges": num_ranges}
        return {**size, "bytes": (path / STATE_FILE).stat().st_size, **results}


def measure_one(act: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """Call a function repeatedly, and return its last result and the median of the seconds."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        result = act()
        seconds.append(time.perf_counter() - begin)
    return result, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="8 ranks: a smoke test, no measurement")
    parser.add_argument("--check", action="store_true", help="exit with 1, and name the bars, where some are missed")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    results = measure(8 if arguments.quick else NUM_RANKS, 1 if arguments.quick else 5)
    print(json.dumps(results, indent=1))
    misses = [f"{bar} {results[bar]:.2f} s > {most} s" for bar, most in BARS.items() if results[bar] > most]
    conclude(results, misses, arguments)


if __name__ == "__main__":
    main()
