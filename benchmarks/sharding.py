"""How fast are shards made? `python benchmarks/sharding.py [--quick] [--check]`

Photographs of ImageNet's size (about 500 × 375 pixels and 110 kB: views of scikit-learn's two sample images, with
noise) lie in class folders. Ours and tar take turns, whole commands with their start-up, with the page cache in the
same state: all files have been read before.

    sharding   python -m data_prep.shard TREE OUT   (reads, checks, hashes, writes, flushes to disk)
               against  tar cf - TREE | cat > /dev/null   (only reads)
    indexing   python -m data_prep.index DIR, of the tars without their manifest, against  tar tf  of each of them

Rates are bytes of images, or of tars, per second: medians, and the median of the paired ratios.
"""

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
BARS = {"sharding": 0.7, "indexing": 0.5}
NUM_CLASSES = 100
NUM_VIEWS = 250  # that differ; every file lies on disk for itself
TMPFS = "tmpfs"


def make_photos(num_views: int) -> list[bytes]:
    """Turned, cropped, resized and noisy views of real photographs, as JPEGs."""
    from sklearn.datasets import load_sample_images

    random = np.random.RandomState(0)
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    views = []
    for i in range(num_views):
        width = random.randint(440, 561)
        height = int(width * random.uniform(0.65, 0.85))
        photo = photos[i % 2].rotate(random.uniform(-10, 10), Image.Resampling.BICUBIC)
        scale = random.uniform(0.6, 0.9)
        wide, high = int(photo.width * scale), int(photo.height * scale)
        left, top = random.randint(0, photo.width - wide), random.randint(0, photo.height - high)
        photo = photo.crop((left, top, left + wide, top + high)).resize((width, height), Image.Resampling.BICUBIC)
        noisy = np.asarray(photo) + random.normal(0, 18, (height, width, 3))
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        views.append(buffer.getvalue())
    return views


def write_tree(tree: Path, num_files: int) -> int:
    """Class folders with `num_files` photographs; return their bytes."""
    views = make_photos(min(NUM_VIEWS, num_files))
    for label in range(NUM_CLASSES):
        (tree / f"class{label:03d}").mkdir(parents=True)
    for i in range(num_files):
        (tree / f"class{i % NUM_CLASSES:03d}" / f"{i:06d}.JPEG").write_bytes(views[i % len(views)])
    os.sync()
    return sum(len(views[i % len(views)]) for i in range(num_files))


def seconds_of(command: Callable[[], object]) -> float:
    start = time.perf_counter()
    command()
    return time.perf_counter() - start


def data_prep(*arguments: object) -> None:
    line = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)


def tar_through_a_pipe(tree: Path) -> None:
    with subprocess.Popen(["tar", "cf", "-", tree.name], cwd=tree.parent, stdout=subprocess.PIPE) as tar:
        subprocess.run(["cat"], stdin=tar.stdout, stdout=subprocess.DEVNULL, check=True)
    assert tar.returncode == 0


def list_tars(folder: Path) -> None:
    for path in sorted(folder.glob("*.tar")):
        subprocess.run(["tar", "tf", path], stdout=subprocess.DEVNULL, check=True)


def compare(num_bytes: int, ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict[str, float]:
    """Medians in MB/s and the median ratio of `rounds` pairs, which follow one that only warms up."""
    pairs = [(seconds_of(ours), seconds_of(theirs)) for _ in range(rounds + 1)][1:]
    return {
        "ours": statistics.median(num_bytes / our / 1e6 for our, _ in pairs),
        "tar": statistics.median(num_bytes / their / 1e6 for _, their in pairs),
        "ratio": statistics.median(their / our for our, their in pairs),
    }


def file_system(folder: Path) -> str:
    """Type of the file system that holds `folder`, as Linux names it."""
    done = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def measure(folder: Path, num_files: int, rounds: int, num_workers: int) -> dict[str, dict[str, float]]:
    tree, out = folder / "tree", folder / "out"
    num_bytes = write_tree(tree, num_files)
    kind = file_system(folder)
    where = "memory" if kind == TMPFS else "a disk"
    print(f"{num_files:,} files, {num_bytes / 1e6:,.0f} MB, {num_workers} workers, in {folder} ({kind}: {where})")

    def shard() -> None:
        data_prep("data_prep.shard", tree, out, "--workers", num_workers)

    def shard_afresh() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shard()

    def index() -> None:
        data_prep("data_prep.index", out, "--workers", num_workers)

    shard_afresh()
    results = {}
    return results
