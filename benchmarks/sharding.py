"""Measure how fast shards are made: `python -m benchmarks.sharding [--quick] [--check] [--json FILE]`

Photographs of ImageNet's size (about 500 × 375 pixels and 110 kB: views of scikit-learn's two sample images, with
noise) lie in class folders. Ours and tar take turns, and all files are read before each, so that the page cache is
in the same state:

    sharding   python -m data_prep.shard TREE OUT   (reads, checks, hashes, writes, flushes to disk)
               against  tar cf - TREE | cat > /dev/null   (only reads)
    indexing   python -m data_prep.index DIR, of the tars without their manifest, against  tar tf  of each of them

Rates are bytes of images, or of tars, per second: medians, and medians of the paired ratios. Python and its
workers take their time to start, which ImageNet (140 GB) does not notice and a benchmark's few files do: it is
measured on a source of a few files, in each round, and the rates are given with it and without. The bars are for
those without.

With `--writes`, nothing of this: in this process, shards are written past the page cache, as data_prep.shard does, and
by plain writes with an fsync, in turn.
"""

import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.command import conclude, make_parser
from data_prep.shard import Plan
from data_prep.shards import tar_writer
from data_prep.shards.direct_io import DirectFile
from data_prep.sources.discover import find_sources

ROOT = Path(__file__).parents[1]
BARS = {"sharding": 0.7, "indexing": 0.5}
NUM_VIEWS = 250  # that differ; every file lies on disk for itself


def make_photos(num_views: int) -> list[bytes]:
    """Make turned, cropped, resized and noisy views of real photographs, as JPEGs."""
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


def write_tree(tree: Path, num_files: int, num_classes: int = 100) -> int:
    """Write class folders with `num_files` photographs, and return their bytes."""
    views = make_photos(min(NUM_VIEWS, num_files))
    for label in range(num_classes):
        (tree / f"class{label:03d}").mkdir(parents=True)
    for i in range(num_files):
        (tree / f"class{i % num_classes:03d}" / f"{i:06d}.JPEG").write_bytes(views[i % len(views)])
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


class Contest(NamedTuple):
    """Describe a contest of our command, on many files and on few, with theirs; `reset` prepares each of ours."""

    num_bytes: int
    reset: Callable[[], object]
    ours: Callable[[], object]
    start: Callable[[], object]
    theirs: Callable[[], object]


def compare(contest: Contest, tree: Path, rounds: int) -> dict[str, float]:
    """Compute medians of rates in MB/s, of ratios, and of the start in seconds, after a round that only warms up."""
    seconds: list[tuple[float, float, float]] = []
    for _ in range(rounds + 1):
        contest.reset()
        read_files(tree)
        ours = seconds_of(contest.ours)
        start = seconds_of(contest.start)
        read_files(tree)
        seconds.append((ours, start, seconds_of(contest.theirs)))
    seconds = seconds[1:]
    megabytes = contest.num_bytes / 1e6
    return {
        "ours": statistics.median(megabytes / (ours - start) for ours, start, _ in seconds),
        "whole": statistics.median(megabytes / ours for ours, _, _ in seconds),
        "tar": statistics.median(megabytes / theirs for _, _, theirs in seconds),
        "ratio": statistics.median(theirs / (ours - start) for ours, start, theirs in seconds),
        "whole_ratio": statistics.median(theirs / ours for ours, _, theirs in seconds),
        "start_seconds": statistics.median(start for _, start, _ in seconds),
    }


def read_files(tree: Path) -> None:
    for path in tree.rglob("*.JPEG"):
        path.read_bytes()


def file_system(folder: Path) -> str:
    """Return the type of the file system that holds `folder`, as Linux names it."""
    done = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def remove_manifest(folder: Path) -> None:
    for path in folder.iterdir():
        if path.suffix != ".tar":
            path.unlink()


def measure(folder: Path, num_files: int, rounds: int, num_workers: int) -> dict[str, dict[str, float]]:
    """Measure the results by name of the bar, in a `folder` to which this writes twice the bytes of the files."""
    tree, out, few, few_out = (folder / name for name in ("tree", "out", "few", "few_out"))
    num_bytes = write_tree(tree, num_files)
    write_tree(few, 2 * num_workers, num_classes=1)
    kind = file_system(folder)
    print(
        f"{num_files:,} files, {num_bytes / 1e6:,.0f} MB, {num_workers} workers, {rounds} rounds, "
        f"in {folder}: {kind}, {'memory' if kind == 'tmpfs' else 'not tmpfs'}",
        flush=True,
    )
    workers = ("--workers", num_workers)
    sharding = Contest(
        num_bytes,
        reset=lambda: (remove(out), remove(few_out)),
        ours=lambda: data_prep("data_prep.shard", tree, out, *workers),
        start=lambda: data_prep("data_prep.shard", few, few_out, "--shard-size", 1, *workers),
        theirs=lambda: tar_through_a_pipe(tree),
    )
    results = {"sharding": compare(sharding, tree, rounds)}
    indexing = Contest(
        sum(path.stat().st_size for path in out.glob("*.tar")),
        reset=lambda: (remove_manifest(out), remove_manifest(few_out)),
        ours=lambda: data_prep("data_prep.index", out, *workers),
        start=lambda: data_prep("data_prep.index", few_out, *workers),
        theirs=lambda: list_tars(out),
    )
    return results | {"indexing": compare(indexing, out, rounds)}


class PlainFile:
    """Write through the page cache; the methods are those of `DirectFile`."""

    def __init__(self, path: Path):
        self._file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115

    def __enter__(self) -> "PlainFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, data: bytes) -> None:
        self._file.write(data)

    def finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def compare_writes(folder: Path, num_files: int, rounds: int) -> None:
    """Print the median ratios of plain to direct writes: of seconds with quartiles, and of processor seconds."""
    tree, out = folder / "tree", folder / "out"
    write_tree(tree, num_files)
    [source] = find_sources(tree, None)
    seconds: dict[type, list[float]] = {DirectFile: [], PlainFile: []}
    cpu_seconds: dict[type, list[float]] = {DirectFile: [], PlainFile: []}
    for number in range(rounds + 1):
        for kind in list(seconds)[:: 1 if number % 2 else -1]:
            read_files(tree)
            remove(out)
            out.mkdir()
            os.sync()
            plan = Plan(source, out, 0, 1000, None)
            tasks = list(plan.tasks(list(range(plan.mark.num_shards)), source, write=True))
            tar_writer.DirectFile = kind
            cpu_start = time.process_time()
            seconds[kind].append(seconds_of(lambda tasks=tasks: [tar_writer.write_shard(task) for task in tasks]))
            cpu_seconds[kind].append(time.process_time() - cpu_start)
    ratios, cpu_ratios = (
        [plain / direct for direct, plain in zip(found[DirectFile][1:], found[PlainFile][1:], strict=True)]
        for found in (seconds, cpu_seconds)
    )
    low, median, high = statistics.quantiles(ratios)
    print(
        f"{num_files:,} files, {rounds} rounds: plain writes need {median:.2f} times the time of direct ones "
        f"(quartiles {low:.2f} to {high:.2f}), {statistics.median(cpu_ratios):.2f} times the processor time"
    )


def main() -> None:
    parser = make_parser("sharding", __doc__, "2,000 files and 2 rounds")
    parser.add_argument("--dir", type=Path, help="folder to work in; a temporary one where absent")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--writes", action="store_true", help="compare direct with plain writes instead")
    args = parser.parse_args()
    if args.quick:
        args.files, args.rounds = 2_000, 2
    if args.dir is not None:
        args.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        if args.writes:
            compare_writes(Path(folder), args.files, args.rounds)
            return
        results = measure(Path(folder), args.files, args.rounds, args.workers)
    print(f"{'MB/s':10}{'ours':>9}{'tar':>9}{'ratio':>8}{'bar':>6}   with the start of ours:")
    for name, result in results.items():
        print(
            f"{name:10}{result['ours']:9,.0f}{result['tar']:9,.0f}{result['ratio']:8.2f}{BARS[name]:6.2f}"
            f"   {result['whole']:,.0f}, ratio {result['whole_ratio']:.2f}, start {result['start_seconds']:.2f} s"
        )
    missed = [name for name, result in results.items() if result["ratio"] < BARS[name]]
    conclude(results, missed, args)


if __name__ == "__main__":
    main()
