"""Cache a remote split on this node: the whole manifest, and shards as they are used, within a budget.

    CACHE_DIR/gcvit-cache/train-0123456789abcdef/    one folder for each URL and content of manifest.json
        manifest.json  manifest.*.npy                as beside local shards
        train-000007.tar                             complete and checked
        train-000009.tar.part                        being downloaded, and locked by that process

Any process may open any shard: the first one downloads it, while others of the node wait for it. The least recently
used shard is evicted first, whichever data set it belongs to; a process that has it open reads on. `Prefetcher`
downloads shards before they are needed. The directory should be on a disk of the node: locks over a network file
system are slow if they work at all.
"""

import hashlib
import json
import os
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from io import BufferedRandom
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gcvit.data.download import Absent, Say, Stopped, download, join, local_errors, lock_file, redact, say_on_stderr
from gcvit.data.manifest import COLUMNS, FILE_NAME, Shard, column_path
from gcvit.errors import UserError

# Everything is written below a folder of this name, and nothing else is evicted: the cache directory may hold tars of
# the user.
CACHE_FOLDER = "gcvit-cache"
_PART = ".part"
_NUM_PREFETCH_THREADS = 2  # one waits for the network while the other checks and syncs


class Cached(NamedTuple):
    """A complete shard in the cache, and when it was last used."""

    path: Path
    num_bytes: int
    used_ns: int


def choose_victims(cached: Sequence[Cached], num_bytes_to_free: int) -> list[Cached]:
    """Choose the least recently used shards, as few as free `num_bytes_to_free`; all, if that is not enough."""
    victims: list[Cached] = []
    for shard in sorted(cached, key=lambda shard: (shard.used_ns, shard.path)):
        if num_bytes_to_free <= 0:
            break
        victims.append(shard)
        num_bytes_to_free -= shard.num_bytes
    return victims


def fetch_manifest(data_dir: str, split: str, cache_dir: Path, say: Say = say_on_stderr) -> tuple[str, Path]:
    """Download the manifest and the columns of a split; safe for all processes of a node at once.

    The split lies in `data_dir/split` or in `data_dir` itself, as in `gcvit.data.manifest.find_split`.
    `manifest.json` is downloaded each time, and a changed one gets another local folder; columns are downloaded
    if they are missing or corrupt. `read_manifest` checks the content.

    Returns:
        The URL of the folder with the shards, and the local folder.

    Raises:
        UserError: there is no such split, and as `download`.
    """
    root = cache_dir.absolute() / CACHE_FOLDER
    with local_errors():
        root.mkdir(parents=True, exist_ok=True)
    url, content = _find_manifest(data_dir, split, root, say)
    key = hashlib.sha256(redact(url).encode() + content).hexdigest()[:16]
    folder = root / f"{split}-{key}"
    with local_errors():
        folder.mkdir(exist_ok=True)
    hashes = json.loads(content).get("columns")
    for name in COLUMNS:
        if isinstance(hashes, dict) and name in hashes:
            _fetch_column(url, folder, name, hashes[name], say)
    part = folder / (FILE_NAME + _PART)
    with lock_file(part) as file, local_errors():
        assert file
        file.truncate(0)
        file.write(content)
        file.flush()
        os.replace(part, folder / FILE_NAME)
    return url, folder


def _find_manifest(data_dir: str, split: str, root: Path, say: Say) -> tuple[str, bytes]:
    """Find the URL of the split's folder, and read the bytes of its manifest.json, which is some JSON object."""
    reasons = []
    for url in (join(data_dir, split), data_dir):
        with tempfile.TemporaryFile(dir=root) as file:
            try:
                download(join(url, FILE_NAME), file, check=partial(_check_json, file), say=say)
            except Absent as error:  # S3 answers 403 for a missing file if listing is not allowed
                reasons.append(error.where)
                continue
            file.seek(0)
            content = file.read()
        other = json.loads(content).get("split")
        if url != data_dir or other == split:
            return url, content
        reasons.append(f"{redact(join(url, FILE_NAME))} is for {other!r}")
    raise UserError(
        f"the remote data directory has no split {split!r}",
        got="; ".join(reasons),
        expected=f"{FILE_NAME} beside shards, in DATA_DIR/{split} or DATA_DIR; class folders are read from disks only",
        hint="check --data_dir and the credentials; upload manifest.json and manifest.*.npy with the shards",
    )


def _check_json(file: BinaryIO) -> str | None:
    file.seek(0)
    try:
        return None if isinstance(json.load(file), dict) else "no JSON object"
    except ValueError:
        return "corrupt JSON"


def _fetch_column(url: str, folder: Path, name: str, expected: object, say: Say) -> None:
    path = column_path(folder, name)
    part = path.with_name(path.name + _PART)
    with lock_file(part) as file:
        assert file
        if _check_column(path, name, expected) is not None:
            check = partial(_check_column, part, name, expected)
            download(join(url, path.name), file, check=check, say=say)
            os.replace(part, path)


def _check_column(path: Path, name: str, expected: object) -> str | None:
    try:
        column: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError):
        return "no column of numbers"
    if getattr(column, "dtype", None) != COLUMNS[name]:
        return "no column of numbers"
    found = hashlib.sha256(np.ascontiguousarray(column).data).hexdigest()
    return None if found == expected else f"SHA-256 {found} instead of {expected}"


class ShardCache:
    """The shards of one remote split, by number. Pickles to little; safe in any number of threads and processes.

    Args:
        url: as `fetch_manifest` returned it; so is `folder`.
        max_bytes: most bytes of the cache directory, other splits and data sets included: complete shards and those
            that are being downloaded, but not manifests. None is no limit.

    Raises:
        UserError: the largest shard exceeds the budget, or a shard's name is not that of a tar.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        shards: tuple[Shard, ...],
        max_bytes: int | None,
        say: Say = say_on_stderr,
    ):
        assert folder.parent.name == CACHE_FOLDER, "folder is not from fetch_manifest"
        for shard in shards:
            if os.path.basename(shard.name) != shard.name or not shard.name.endswith(".tar"):
                raise UserError("a remote shard's name", got=repr(shard.name), expected="the plain name of a .tar file")
        largest = max(shard.num_bytes for shard in shards)
        if max_bytes is not None and max_bytes < largest:
            raise UserError("the cache's budget is smaller than a shard", got=max_bytes, expected=f"{largest} or more")
        self.shards = shards
        self._url, self._folder, self._max_bytes, self._say = url, folder, max_bytes, say

    def open(self, number: int) -> int:
        """Open shard `number` for reading, after downloading it if necessary.

        The descriptor stays valid when the shard is evicted; its space, then beyond the budget, is free once it is
        closed. `os.utime(descriptor)` now and then marks the shard as used.

        Returns:
            A descriptor, which the caller closes.

        Raises:
            UserError: as `download`.
        """
        descriptor = self._open(number, threading.Event(), wait=True)
        assert descriptor is not None
        return descriptor

    def prefetch(self, number: int, stop: threading.Event) -> None:
        """Download shard `number` unless it is here or another process of the node is downloading it.

        Raises:
            UserError: as `download`.
        """
        descriptor = self._open(number, stop, wait=False)
        if descriptor is not None:
            os.close(descriptor)

    def _open(self, number: int, stop: threading.Event, wait: bool) -> int | None:
        shard = self.shards[number]
        path = self._folder / shard.name
        part = path.with_name(shard.name + _PART)
        while (descriptor := _open_complete(path, shard.num_bytes)) is None:
            with lock_file(part, wait) as file:
                if file is None:
                    return None
                if not path.exists():  # not downloaded by another process meanwhile
                    self._make_room(file, shard.num_bytes, stop)
                    check = partial(_check_shard, file, shard.sha256)
                    url = join(self._url, shard.name)
                    download(url, file, num_bytes=shard.num_bytes, check=check, say=self._say, stop=stop)
                    # Opened before it gets its name: from then on others may evict it.
                    descriptor = os.open(part, os.O_RDONLY)
                    os.replace(part, path)
                    return descriptor
        return descriptor

    def _make_room(self, file: BufferedRandom, num_bytes: int, stop: threading.Event) -> None:
        """Evict until `num_bytes` more fit into the budget, and give `file` that size, so that others count it.

        If other downloads use up the budget, wait until they are complete: then they can be evicted.
        """
        if self._max_bytes is None:
            return
        file.truncate(0)  # the rest of a killed process
        root = self._folder.parent
        while True:
            with lock_file(root / "lock"), local_errors():
                # In this order: a shard that gets its name meanwhile is counted twice rather than not at all.
                allowed = self._max_bytes - num_bytes - sum(_find_downloading(root))
                cached = list(_find_cached(root))
                if allowed >= 0:
                    for victim in choose_victims(cached, sum(shard.num_bytes for shard in cached) - allowed):
                        victim.path.unlink(missing_ok=True)
                    file.truncate(num_bytes)  # occupies no space yet
                    return
            if stop.wait(0.1):
                raise Stopped


def _open_complete(path: Path, num_bytes: int) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size != num_bytes:  # not written by this module: files get their names when complete
        os.close(descriptor)
        path.unlink(missing_ok=True)
        return None
    with suppress(PermissionError):  # in a cache that another user filled
        os.utime(descriptor)
    return descriptor


def _check_shard(file: BufferedRandom, expected: str | None) -> str | None:
    if expected is None:
        return None
    file.seek(0)
    found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == expected else f"SHA-256 {found} instead of {expected}"


def _find_cached(root: Path) -> Iterator[Cached]:
    for path in root.glob("*/*.tar"):
        with suppress(FileNotFoundError):
            status = path.stat()
            yield Cached(path, status.st_size, status.st_mtime_ns)


def _find_downloading(root: Path) -> Iterator[int]:
    """Yield the bytes of each shard that is being downloaded; those that a killed process left are removed."""
    for path in root.glob(f"*/*.tar{_PART}"):
        with suppress(FileNotFoundError), lock_file(path, wait=False) as file:
            if file is None:
                yield path.stat().st_size


class Prefetcher:
    """Download the shards of `order`, numbers in the order of first use, in daemon threads.

    They stay at most `window_bytes` ahead of `advance`. A failure is only reported: `ShardCache.open` tries again
    when the shard is needed, and raises. The window should be well below the cache's budget, or shards are evicted
    before they are used.
    """

    def __init__(self, cache: ShardCache, order: Iterable[int], window_bytes: int, say: Say = say_on_stderr):
        self._cache, self._order, self._window_bytes, self._say = cache, iter(order), window_bytes, say
        self._order_lock = threading.Lock()  # `_changed` guards the numbers
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._num_requested = self._num_used = 0  # entries of the order
        self._ahead: deque[int] = deque()  # bytes of those that were requested and are not used
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(_NUM_PREFETCH_THREADS)]
        for thread in self._threads:
            thread.start()

    def advance(self, num_used: int) -> None:
        """Report that the first `num_used` entries of the order are in use, or were."""
        with self._changed:
            while self._num_used < num_used and self._ahead:
                self._ahead.popleft()
                self._num_used += 1
            self._num_used = max(self._num_used, num_used)
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads; a running download ends within seconds, and leaves no file."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=1)  # one that waits for a silent server ends by itself, or with the process

    def _run(self) -> None:
        while (number := self._pop_next()) is not None:
            try:
                self._cache.prefetch(number, self._stop)
            except Stopped:
                return
            except UserError as error:
                self._say(f"prefetch: {error}")

    def _pop_next(self) -> int | None:
        """Wait until the window has room, and return the next shard; None at the end of the order."""
        with self._order_lock:
            while self._wait_for_room():
                # Outside of `_changed`: an order may have to plan an epoch first, and `advance` never waits for that.
                number = next(self._order, None)
                if number is None:
                    return None
                with self._changed:
                    self._num_requested += 1
                    if self._num_requested > self._num_used:  # else the stream was faster, and has downloaded it
                        self._ahead.append(self._cache.shards[number].num_bytes)
                        return number
            return None

    def _wait_for_room(self) -> bool:
        with self._changed:
            while not self._stop.is_set() and self._ahead and sum(self._ahead) >= self._window_bytes:
                self._changed.wait()
            return not self._stop.is_set()
