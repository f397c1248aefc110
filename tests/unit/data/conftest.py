import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gcvit.data.manifest import COLUMNS, Shard, write_manifest

CLASSES = ("ape", "bee", "cat")


def write_images(root: Path, num_images: int) -> None:
    """A class-folder tree of small JPEGs: class c is bright in channel c alone, classes are uneven."""
    rng = np.random.default_rng(num_images)
    for index in range(num_images):
        label = min(index % 5, 2)
        pixels = rng.integers(0, 60, (20 + index % 7, 24, 3), dtype=np.uint8)
        pixels[..., label] += 190
        folder = root / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index:03}.jpg", quality=95, subsampling=0)


def write_shards(images: Path, root: Path, split: str, num_shards: int) -> None:
    """The same samples in tars, as `data_prep` lays them out: only what a reader needs."""
    root.mkdir(parents=True)
    files = sorted(images.rglob("*.jpg"))
    columns: dict[str, list[int]] = {name: [] for name in COLUMNS}
    shards = []
    for shard in range(num_shards):
        name = f"{split}-{shard:06}.tar"
        with tarfile.open(root / name, "w") as tar:
            for file in (chosen := files[shard::num_shards]):
                content = file.read_bytes()
                member = tarfile.TarInfo(f"{file.parent.name}/{file.name}")
                member.size = len(content)
                columns["offset"].append(tar.offset + 512)
                columns["length"].append(len(content))
                columns["label"].append(CLASSES.index(file.parent.name))
                columns["crc32"].append(zlib.crc32(content))
                tar.addfile(member, io.BytesIO(content))
        shards.append(Shard(name, len(chosen), (root / name).stat().st_size, "0" * 64))
    write_manifest(root, split, CLASSES, shards, {name: np.array(values) for name, values in columns.items()})


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory) -> Path:
    """DATA_DIR with class folders: 47 samples in train, 23 in val."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 47)
    write_images(root / "val", 23)
    return root


@pytest.fixture
def shard_dir(image_tree, tmp_path) -> Path:
    """DATA_DIR with the same train images in 4 shards, for tests to corruption."""
    write_shards(image_tree / "train", tmp_path / "shards" / "train", "train", num_shards=4)
    return tmp_path / "shards"
