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


def compare(
    num_bytes: int,
    reset: Callable[[], object],
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int,
) -> dict[str, float]:
    """Medians in MB/s and the median ratio of `rounds` pairs, which follow one that only warms up.

    `reset` prepares each of ours and is not timed.
    """
    pairs = []
    for _ in range(rounds + 1):
        reset()
        pairs.append((seconds_of(ours), seconds_of(theirs)))
    return {
        "ours": statistics.median(num_bytes / our / 1e6 for our, _ in pairs[1:]),
        "tar": statistics.median(num_bytes / their / 1e6 for _, their in pairs[1:]),
        "ratio": statistics.median(their / our for our, their in pairs[1:]),
    }


def file_system(folder: Path) -> str:
    """Type of the file system that holds `folder`, as Linux names it."""
    done = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def measure(folder: Path, num_files: int, rounds: int, num_workers: int) -> dict[str, dict[str, float]]:
    """Results by name of the bar, in a `folder` to which this writes twice the bytes of the files."""
    tree, out = folder / "tree", folder / "out"
    num_bytes = write_tree(tree, num_files)
    kind = file_system(folder)
    print(
        f"{num_files:,} files, {num_bytes / 1e6:,.0f} MB, {num_workers} workers, {rounds} pairs, "
        f"in {folder}: {kind}, {'memory' if kind == 'tmpfs' else 'not tmpfs'}",
        flush=True,
    )
    workers = ("--workers", num_workers)
    sharding = compare(
        num_bytes,
        lambda: shutil.rmtree(out, ignore_errors=True),
        lambda: data_prep("data_prep.shard", tree, out, *workers),
        lambda: tar_through_a_pipe(tree),
        rounds,
    )

    def remove_manifest() -> None:
        for path in out.iterdir():
            if path.suffix != ".tar":
                path.unlink()

    indexing = compare(
        sum(path.stat().st_size for path in out.glob("*.tar")),
        remove_manifest,
        lambda: data_prep("data_prep.index", out, *workers),
        lambda: list_tars(out),
        rounds,
    )
    return {"sharding": sharding, "indexing": indexing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dir", type=Path, help="folder to work in; a temporary one where absent")
    parser.add_argument("--files", type=int, default=40_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="2,000 files and 2 pairs: start-up weighs more")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    args = parser.parse_args()
    if args.quick:
        args.files, args.pairs = 2_000, 2
    if args.dir is not None:
        args.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        results = measure(Path(folder), args.files, args.pairs, args.workers)
    print(f"{'':10}{'ours MB/s':>12}{'tar MB/s':>12}{'ratio':>8}{'bar':>7}")
    for name, result in results.items():
        print(f"{name:10}{result['ours']:12,.0f}{result['tar']:12,.0f}{result['ratio']:8.2f}{BARS[name]:7.2f}")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    missed = [name for name, result in results.items() if result["ratio"] < BARS[name]]
    if args.check and missed:
        sys.exit("bars missed: " + ", ".join(missed))


if __name__ == "__main__":
    main()
