"""Define the files of a checkpoint (format 3): their names, the tensors of the ranks, the index and the hashes.

A checkpoint is a folder `step_00000012`. Each rank has written one safetensors file in it, `rank_00000.safetensors`:
the ranges of flattened tensors that it holds, one 1-D fp32 tensor for each, named by kind and parameter
("model.head.weight", "exp_avg...", "exp_avg_sq...", "ema..."). `state.json` holds everything else:

    format      3
    state       step, samples consumed, counters, ...
    config, data, world_size, classes
    files       {file: {"bytes": ..., "sha256": ...}}
    tensors     {name: {"shape": [...], "ranges": [[rank, start, length, count, step], ...]}}: the index
    sha256      of the bytes of `state.json` before this member

A row of `ranges` stands for `count` ranges of equal length that follow each other. The i-th is that of rank
`rank + i * step`, and holds the elements from `start + i * length` on. The rows are sorted by `start`. So the index of
512 ranks is hardly larger than that of two. `examples/read_checkpoint.py` reads a checkpoint without this package.

The module imports the standard library alone: the process that writes checkpoints (`writer_process.py`) loads nothing
else.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

FORMAT = 3
STATE_FILE = "state.json"
LAST_COMMIT_OF_FORMAT_2 = "a2db64e"

FileRecord = dict[str, Any]  # "bytes" and "sha256" of a file
Index = dict[str, dict[str, Any]]  # "shape" and "ranges" of each tensor, as in `state.json`

_CHUNK = 8 << 20  # bytes that are written, hashed or compared at once
_SHA256_MEMBER = b',\n"sha256": "'


class ReadBackError(Exception):
    """Report a file that does not read back as it was written; `path` is the file."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        self.path = path


# ---- names ---------------------------------------------------------------------------------------


def step_dir(step: int) -> str:
    """Name the folder of the checkpoint of a step."""
    return f"step_{step:08d}"


def rank_file(rank: int) -> str:
    """Name the file that a rank writes."""
    return f"rank_{rank:05d}.safetensors"


# ---- the index -----------------------------------------------------------------------------------


def find_pieces(ranges: Sequence[Sequence[int]], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Find the pieces that store the elements [start, stop) of a flattened tensor.

    Args:
        ranges: The tensor's rows of the index.
        start: The first element.
        stop: The first element after the last.

    Yields:
        (rank, begin, end) in order: the elements [begin, end) of the tensor's part in the rank's file.

    Raises:
        ValueError: The ranges do not hold all of these elements.
    """
    place = start
    first = max(bisect_right(ranges, start, key=itemgetter(1)) - 1, 0)
    for rank, begin, length, count, step in islice(ranges, first, None):
        while place < stop and begin <= place < begin + length * count:
            number, offset = divmod(place - begin, length)
            end = min(length, offset + stop - place)
            yield rank + number * step, offset, end
            place += end - offset
    if place < stop:
        raise ValueError(f"no range holds element {place}")


def encode_index(index: Index) -> str:
    """Encode the index as JSON, a line for each tensor."""
    return _encode_lines(index)


# ---- state.json ----------------------------------------------------------------------------------


def encode_state(content: Mapping[str, Any], index: str) -> bytes:
    """Encode `state.json` and its hash. `content` has all other members but the index, which is encoded already."""
    members = [
        f'"{name}": {_encode_lines(value) if name == "files" else json.dumps(value, indent=1)}'
        for name, value in content.items()
    ]
    body = ("{\n" + ",\n".join([*members, f'"tensors": {index}'])).encode()
    return body + _SHA256_MEMBER + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def decode_state(encoded: bytes) -> tuple[dict[str, Any], bool]:
    """Decode `state.json` and check its hash.

    Returns:
        The content without the hash, and whether the hash is right.

    Raises:
        ValueError: The bytes are no JSON.
        TypeError, KeyError: The JSON is no object with a hash.
    """
    content = json.loads(encoded)
    del content["sha256"]
    body = encoded[: encoded.rfind(_SHA256_MEMBER)]
    tail = _SHA256_MEMBER + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'
    return content, encoded == body + tail


def _encode_lines(rows: Mapping[str, Any]) -> str:
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    return f"{{\n{lines}\n}}"


# ---- files ---------------------------------------------------------------------------------------


def encode_header(lengths: Mapping[str, int]) -> bytes:
    """Encode the header of a safetensors file in which tensors of these lengths follow each other as fp32."""
    entries, place = {}, 0
    for name, length in lengths.items():
        end = place + 4 * length
        entries[name] = {"dtype": "F32", "shape": [length], "data_offsets": [place, end]}
        place = end
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def write_file(path: Path, pieces: Sequence[memoryview], on_progress: Callable[[], None]) -> FileRecord:
    """Write pieces of bytes to a new file, flush it to the disk, read it back and compare it with them.

    Args:
        path: The file to create.
        pieces: Views of single bytes.
        on_progress: Called after each chunk of the work.

    Returns:
        The size in bytes and the SHA-256 of the file.

    Raises:
        OSError: The file cannot be written; the error has its name.
        ReadBackError: The file reads back differently.
    """
    sha256, num_bytes = hashlib.sha256(), 0
    try:
        with open(path, "wb", buffering=0) as file:
            for chunk in _chunks(pieces):
                place = 0
                while place < len(chunk):
                    place += file.write(chunk[place:])
                sha256.update(chunk)
                num_bytes += len(chunk)
                on_progress()
            os.fsync(file.fileno())
        with open(path, "rb", buffering=0) as file:
            _drop_cache(file.fileno())
            for chunk in _chunks(pieces):
                if _read_exactly(file, len(chunk)) != chunk.tobytes():
                    raise ReadBackError(path)
                on_progress()
            if file.read(1):
                raise ReadBackError(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return {"bytes": num_bytes, "sha256": sha256.hexdigest()}


def hash_file(path: Path) -> FileRecord:
    """Hash a file as the disk holds it.

    Raises:
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        _drop_cache(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk.

    Raises:
        OSError: The disk reports an error.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _chunks(pieces: Sequence[memoryview]) -> Iterator[memoryview]:
    for piece in pieces:
        for place in range(0, len(piece), _CHUNK):
            yield piece[place : place + _CHUNK]


def _read_exactly(file: Any, num_bytes: int) -> bytes:
    """Read `num_bytes` bytes, or fewer if the file ends first."""
    content: bytes = file.read(num_bytes)
    while 0 < len(content) < num_bytes:
        more = file.read(num_bytes - len(content))
        if not more:
            break
        content += more
    return content


def _drop_cache(handle: int) -> None:
    """Drop a file from the page cache, so that the next read comes from the disk."""
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
