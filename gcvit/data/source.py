"""Read the encoded samples of a split by number, from shards or from class folders."""

import os
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from isal.isal_zlib import crc32

from gcvit.config.schema import DataConfig
from gcvit.data.download import is_remote
from gcvit.data.folder_source import LAYOUT, class_folders, open_folder
from gcvit.data.manifest import FILE_NAME, Manifest, Shard, column_path, find_split, read_manifest
from gcvit.data.shard_cache import Prefetcher, ShardCache, fetch_manifest
from gcvit.data.shard_pattern import parse_pattern
from gcvit.errors import UserError

DEFAULT_CACHE = "~/.cache/gcvit"
_PREFETCH_BYTES = 2_000_000_000  # of shards that a rank has downloaded and not begun

# Per process, less than the usual limit of 1024 files. A shard is opened for each of its chunks at worst.
_MAX_OPEN_SHARDS = 256
_MAX_OPEN_CACHED = 2  # an evicted shard occupies space until it is closed
_MAX_WASTE = 2  # bytes read for each byte wanted


class CorruptSample(UserError):
    """The bytes of a sample differ from those that were sharded."""


class Source(Protocol):
    """Samples 0 .. N-1 of a split. Pickles to little: each process opens its own files."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def num_samples(self) -> int: ...

    @property
    def label(self) -> npt.NDArray[np.int32]:
        """Return the class of each sample, an index into `classes`: [N]."""

    @property
    def length(self) -> npt.NDArray[np.uint32]:
        """Return the size of each sample in bytes: [N]."""

    @property
    def first(self) -> npt.NDArray[np.int64]:
        """Return the first sample of each shard or class folder, then N: [num_shards + 1]."""

    @property
    def digest(self) -> str:
        """Return hex text that is equal if and only if the samples, their order and their classes are."""

    @property
    def is_chunked(self) -> bool:
        """Tell whether neighbours are stored together, so that a chunk of them is read as quickly as one."""

    def fetch(self, begin: int, end: int) -> list[memoryview]:
        """Read the encoded images `begin` to `end` (exclusive) as they are stored, in few reads; see `check`.

        Raises:
            UserError: they cannot be read.
        """

    def check(self, index: int, content: memoryview) -> None:
        """Compare the content of sample `index` with its checksum.

        Raises:
            CorruptSample: it differs from what was sharded.
        """

    def prefetch(self, shards: Iterable[int]) -> Prefetcher | None:
        """Start to download shards, in this order, ahead of their use; None if all of them are local."""

    def name(self, index: int) -> str:
        """Describe where sample `index` is stored, for messages."""


class ShardSource:
    """The samples of a manifest, read from its tars at their offsets; `cache` downloads remote tars."""

    def __init__(self, manifest: Manifest, cache: ShardCache | None = None, prefetch_bytes: int = 0):
        self._manifest, self._cache, self._prefetch_bytes = manifest, cache, prefetch_bytes
        # Shard to descriptor, the least recently used first.
        self._files: OrderedDict[int, int] = OrderedDict()
        self._owner = os.getpid()
        self.classes, self.num_samples, self.first = manifest.classes, manifest.num_samples, manifest.first
        # Plain arrays over the mapped memory, whose elements are read in a tenth of the time.
        self.label, self.length = np.asarray(manifest.label), np.asarray(manifest.length)
        self._crc32 = None if manifest.crc32 is None else np.asarray(manifest.crc32)

    def __reduce__(self) -> tuple[Any, ...]:
        # Columns are mapped again rather than copied, and not checked again, by each worker.
        manifest = self._manifest
        names = tuple(manifest.columns)
        return _reopen, (manifest.root, manifest.split, manifest.classes, manifest.shards, names, self._cache)

    def __del__(self) -> None:
        if os is not None:  # as it is when the interpreter ends, and closes all files itself
            self._close()

    @property
    def digest(self) -> str:
        return self._manifest.digest

    @property
    def shard_names(self) -> list[str]:
        return [shard.name for shard in self._manifest.shards]

    def name(self, index: int) -> str:
        return self._manifest.member_name(index)

    @property
    def is_chunked(self) -> bool:
        return True

    def prefetch(self, shards: Iterable[int]) -> Prefetcher | None:
        return Prefetcher(self._cache, shards, self._prefetch_bytes) if self._cache else None

    def fetch(self, begin: int, end: int) -> list[memoryview]:
        contents: list[memoryview] = []
        while begin < end:
            shard = int(np.searchsorted(self.first, begin, side="right")) - 1
            stop = min(end, int(self.first[shard + 1]))
            contents += self._fetch_from(shard, begin, stop)
            begin = stop
        return contents

    def _fetch_from(self, shard: int, begin: int, end: int) -> list[memoryview]:
        offset = self._manifest.offset[begin:end].astype(np.int64)
        ends = offset + self.length[begin:end]
        low, high = int(offset.min()), int(ends.max())
        # In tars of others, something large may lie between the images.
        if high - low > _MAX_WASTE * int(self.length[begin:end].sum()) and end - begin > 1:
            return [self._fetch_from(shard, index, index + 1)[0] for index in range(begin, end)]
        try:
            descriptor = self._open(shard)
            if self._cache:
                with suppress(PermissionError):  # in a cache that another user filled
                    os.utime(descriptor)  # in use: not the first to be evicted
            stored = np.empty(high - low, np.uint8).data  # which a decoder may write to, unlike bytes
            num_read = 0
            while num_read < high - low:  # a read may be short
                if not (part := os.preadv(descriptor, [stored[num_read:]], low + num_read)):
                    break
                num_read += part
            stored = stored[:num_read]
        except OSError as error:
            raise UserError("cannot read a sample", got=f"{self.name(begin)} ({error.strerror})") from None
        return [stored[one:other] for one, other in zip((offset - low).tolist(), (ends - low).tolist(), strict=True)]

    def check(self, index: int, content: memoryview) -> None:
        length = int(self.length[index])
        if len(content) != length:
            kind = f"{len(content)} of {length} bytes"
        elif self._crc32 is not None and crc32(content) != int(self._crc32[index]):
            kind = "another checksum"
        else:
            return
        raise CorruptSample(kind)

    def _open(self, shard: int) -> int:
        if self._owner != os.getpid():  # forked: the descriptors are the parent's, only this table is ours
            self._files, self._owner = OrderedDict(), os.getpid()
        if shard not in self._files:
            if len(self._files) >= (_MAX_OPEN_CACHED if self._cache else _MAX_OPEN_SHARDS):
                os.close(self._files.popitem(last=False)[1])
            path = self._manifest.root / self._manifest.shards[shard].name
            self._files[shard] = self._cache.open(shard) if self._cache else os.open(path, os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _close(self) -> None:
        while self._owner == os.getpid() and self._files:
            os.close(self._files.popitem()[1])


def num_local_ranks() -> int:
    """Count the ranks on this node, as torchrun or the deepspeed launcher set them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def _reopen(
    root: Path,
    split: str,
    classes: tuple[str, ...],
    shards: tuple[Shard, ...],
    names: tuple[str, ...],
    cache: ShardCache | None,
) -> ShardSource:
    columns = {name: np.load(column_path(root, name), mmap_mode="r", allow_pickle=False) for name in names}
    return ShardSource(Manifest(root, split, classes, shards, **columns), cache)


def open_source(
    data_dir: str | Path, split: str, cache_dir: str | None = None, cache_bytes: int | None = None
) -> Source:
    """Open the samples of `split` below `data_dir`: shards with a manifest, or class folders.

    The labels of a class-folder tree number the folders of its `train`, for other splits too.

    Args:
        data_dir: a folder, a URL, or a pattern of shards (see `gcvit.data.shard_pattern`).
        split: "train" or "val".
        cache_dir: folder for the shards of a URL; None is ~/.cache/gcvit.
        cache_bytes: most bytes of shards that are kept there; None keeps all.

    Raises:
        UserError: a missing or empty directory, no such split, a class folder without images, tars without a
            manifest or compressed, a manifest that disagrees with its tars or with the pattern.
    """
    pattern = parse_pattern(str(data_dir))
    if pattern is None:
        return _open_source(data_dir, split, cache_dir, cache_bytes)
    source = _open_source(pattern.data_dir, split, cache_dir, cache_bytes)
    if pattern.split in (None, split):
        pattern.check_shards(source.shard_names if isinstance(source, ShardSource) else ())
    return source


def _open_source(data_dir: str | Path, split: str, cache_dir: str | None, cache_bytes: int | None) -> Source:
    if is_remote(str(data_dir)):
        url, folder = fetch_manifest(str(data_dir), split, Path(cache_dir or DEFAULT_CACHE).expanduser())
        manifest = read_manifest(folder, check_shards=False)
        # All ranks of a node prefetch shards, and those in use need room too.
        window = min(_PREFETCH_BYTES, (cache_bytes or 2**62) // (4 * num_local_ranks()))
        return ShardSource(manifest, ShardCache(url, folder, manifest.shards, cache_bytes), window)
    if cache_dir or cache_bytes:
        raise UserError("a cache has no effect: the data lies in a folder", got=data_dir, hint="leave it out")
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        kind = "a file" if data_dir.exists() else "missing"
        raise UserError(
            "the data directory is no directory",
            got=f"{data_dir} ({kind})",
            expected=f"shards from data_prep, or {LAYOUT}",
            hint="check --data_dir",
        )
    is_split = (data_dir / split).is_dir() or (data_dir / FILE_NAME).exists()
    if not is_split and any(data_dir.glob("ILSVRC2012_img_*.tar")):
        hint = f"python -m data_prep.shard {data_dir} OUT, and --data_dir OUT"
        raise UserError("these are ImageNet's archives, not shards", got=data_dir, hint=hint)
    found = find_split(data_dir, split)
    if found is not None:
        return ShardSource(read_manifest(found))
    if not (data_dir / split).is_dir():
        names = sorted(entry.name for entry in data_dir.iterdir() if not entry.name.startswith("."))
        shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "") if names else "an empty directory"
        raise UserError(
            f"the data directory has no split {split!r}: {data_dir}",
            got=shown,
            expected=f"shards from data_prep, or {LAYOUT}",
            hint="check --data_dir",
        )
    train = data_dir / "train"
    # Where train is sharded and this split is not, the folders' own names are all there is to number.
    classes = tuple(class_folders(train)) if split != "train" and train.is_dir() else None
    return open_folder(data_dir / split, classes or None)


def open_sources(data: DataConfig, num_classes: int) -> tuple[Source, Source]:
    """Open the train and the val split of `data.dir`.

    Args:
        data: section of the config.
        num_classes: width of the model's head.

    Raises:
        UserError: the data is missing or corrupt, or its classes are not the model's, or differ between the splits.
    """
    if data.dir is None:
        raise UserError("no data", hint="give --data_dir DIR, a folder with train/ and val/")
    train, val = (open_source(data.dir, split, data.cache_dir, data.cache_bytes) for split in ("train", "val"))
    for source, split in ((train, "train"), (val, "val")):
        if len(source.classes) != num_classes:
            raise UserError(
                f"the data has another number of classes than the model ({split})",
                got=f"{len(source.classes)} classes in {data.dir}",
                expected=f"model.num_classes={num_classes}",
                hint=f"set model.num_classes={len(source.classes)}, or give other data",
            )
    if train.classes != val.classes:
        differing = sorted(set(train.classes) ^ set(val.classes))[:3]
        raise UserError("train and val have different classes", got=", ".join(differing))
    return train, val
