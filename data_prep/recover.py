"""Find the original bytes of corrupt samples in the source of their shards: `verify --repair --source DIR`."""

import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.shards.byte_range import Place, read_place
from data_prep.shards.tar_writer import encode_key
from data_prep.sources.discover import Source, find_sources, spooled
from gcvit.data.manifest import FILE_NAME, Manifest
from gcvit.errors import UserError

# The corrupt samples of each shard to rewrite, numbered as in the split, with their keys where these are known.
Corruption = dict[str, dict[int, str | None]]


@dataclass(frozen=True)
class Restored:
    """A sample in the source: its byte range, its path and its label."""

    place: Place
    path: str
    label: int


def choose_source(manifest: Manifest, root: Path, classes: Path | None) -> Source:
    """Find the part of the source that has the manifest's split.

    Args:
        classes: File that named the classes when the shards were made, or None.

    Raises:
        UserError: There is no such part, or the manifest has no checksums.
    """
    if manifest.crc32 is None:
        raise UserError(
            "--source has no effect: the manifest has no checksums to find the right bytes by",
            got=manifest.root / FILE_NAME,
            hint="repair without it, or python -m data_prep.index --checksums while the tars are valid",
        )
    sources = find_sources(root, None, classes=classes)
    source = next((source for source in sources if source.split == manifest.split or not source.split_folder), None)
    if source is None or not set(source.classes) & set(manifest.classes):
        raise UserError(
            f"the source is not the one that was sharded: {root}",
            got=", ".join(source.split for source in sources),
            expected=f"split {manifest.split} with classes like {manifest.classes[0]}",
            hint="name the source of these shards",
        )
    return source


@contextmanager
def find_restored(
    manifest: Manifest, corruption: Corruption, source: Source | None, workshop: Path
) -> Iterator[tuple[Path, dict[int, list[Restored]]]]:
    """Find the corrupt samples in the source by class, size and crc32.

    Names in the tar only choose among files with the same bytes.

    Returns:
        The root of the places; and for each sample that was found, the files with its bytes, the likeliest first.
    """
    if source is None:
        yield workshop, {}
        return
    assert manifest.crc32 is not None
    key_of = {sample: key for samples in corruption.values() for sample, key in samples.items()}
    class_of = {sample: manifest.classes[int(manifest.label[sample])] for sample in key_of}
    names = set(class_of.values())
    candidates = [index for index, label in enumerate(source.labels) if source.classes[label] in names]
    with spooled(source, np.array(candidates, np.int64), workshop) as source:
        alike: dict[tuple[str, int], list[int]] = defaultdict(list)
        for index in candidates:
            place = source.place(index)
            size = (source.root / place.file).stat().st_size if place.length is None else place.length
            alike[source.classes[source.labels[index]], size].append(index)
        restored: dict[int, list[Restored]] = {}
        taken: set[int] = set()
        for sample in sorted(key_of):
            crc32 = int(manifest.crc32[sample])
            found = [
                index
                for index in alike[class_of[sample], int(manifest.length[sample])]
                if _crc32(source.root, source.place(index)) == crc32
            ]
            found.sort(key=lambda index: (encode_key(source.paths[index]) != key_of[sample], index in taken))
            taken.update(found[:1])
            label = int(manifest.label[sample])
            restored[sample] = [Restored(source.place(index), source.paths[index], label) for index in found]
        yield source.root, restored


def _crc32(root: Path, place: Place) -> int | None:
    try:
        return zlib.crc32(read_place(root, place))
    except (OSError, ValueError):
        return None
