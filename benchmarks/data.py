"""How quick is the input, and does it stay lean? `python -m benchmarks.data [--quick] [--check] [--json FILE]`

Throughput: images a second and core of our stream beside timm's, webdataset's and torchvision's, on the same JPEGs of
ImageNet's size, from encoded bytes to a uint8 batch, with the recipe's RandAugment and without. Each loader runs in
this process with one thread, and is charged with the CPU seconds of this process (`time.process_time`): that is the
work per core that a loader process would do, less the hand-over of a batch, which is the same for all; what other
programs do meanwhile disturbs wall time more. Normalising, erasing and mixing happen on the device in all of them, and
are left out. Files come from the page cache. Rounds are interleaved; ratios are medians of the rounds' ratios.

Then, with loader processes: memory over 20 epochs; how long the batches around an epoch's end are waited for; the
first batch after a deep resume with 1.28 M samples; and the planning of an epoch of 14.2 M samples.
"""

import argparse
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_dataset, create_loader, create_transform
from timm.data.loader import fast_collate
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks.command import conclude, make_parser
from benchmarks.data_scale import (
    make_large,
    measure_boundary,
    measure_memory,
    measure_planning,
    measure_reads,
    measure_resume,
)
from gcvit.config.load import load_config
from gcvit.config.schema import Config
from gcvit.data.batch_plan import BatchPlan
from gcvit.data.loader import train_stream
from gcvit.data.source import open_source

CONFIG = Path(__file__).parent.parent / "configs/gc_vit_tiny.yaml"
IMG_SIZE = 224
NUM_CLASSES = 10
# Sizes of ImageNet's photographs: most have a long side of 500; a quality at which they have its 110 kB.
SIZES = [(500, 375), (500, 375), (375, 500), (500, 333), (640, 480)]
QUALITY, NOISE = 96, 3.0
BARS = {  # measurement: at least, or at most
    "speedup_rand_augment": (">=", 1.5),
    "speedup_plain": (">=", 1.9),
    "read_share": ("<=", 1.1),
    "memory_growth": ("<=", 1.05),
    "epoch_boundary_ms": ("<=", 50.0),
    "resume_s": ("<=", 2.0),
    "planning_s": ("<=", 1.5),
    "planning_mb": ("<=", 300.0),
}


def make_photos(root: Path, num_images: int) -> int:
    """Make a tree of class folders of JPEGs, cut from two photographs, and return their bytes."""
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rng = np.random.default_rng(0)
    num_bytes = 0
    for number in range(num_images):
        photo, (width, height) = photos[number % len(photos)], SIZES[rng.integers(len(SIZES))]
        box_width = min(photo.width, photo.height * width / height) * rng.uniform(0.6, 1)
        box_height = box_width * height / width
        left, top = rng.uniform(0, photo.width - box_width), rng.uniform(0, photo.height - box_height)
        image = photo.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + box_width, top + box_height))
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(image) + rng.normal(0, NOISE, (height, width, 1))
        file = io.BytesIO()
        Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
        path = root / "train" / f"class_{number % NUM_CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
        num_bytes += len(file.getvalue())
    return num_bytes


def make_config(batch_size: int, overrides: list[str]) -> Config:
    """Make the recipe of GC ViT-T with a small batch."""
    fixed = [f"global_batch_size={batch_size}", f"model.img_size={IMG_SIZE}", f"model.num_classes={NUM_CLASSES}"]
    few_lanes = "data.lanes=4"  # which suit a set of a few shards, as 1024 do ImageNet's
    return load_config(CONFIG, [*fixed, few_lanes, *overrides])[0]


def our_batches(shards: Path, batch_size: int, rand_augment: str | None) -> Iterator[torch.Tensor]:
    policy = "null" if rand_augment is None else rand_augment
    config = make_config(batch_size, ["data.num_workers=0", f"augment.rand_augment={policy}"])
    stream = train_stream(
        open_source(shards, "train"),
        config,
        BatchPlan.from_config(config, world_size=1, micro_batch_size=None),
        start_step=0,
        rank=0,
        pin_memory=False,
    )
    return (batch.images for (batch,) in stream)


def timm_batches(name: str, root: Path, batch_size: int, rand_augment: str | None) -> Iterator[torch.Tensor]:
    """Yield the batches of timm's loader over the reader `name`, before they go to the device and are normalised."""
    dataset = create_dataset(name, root=str(root), split="train", is_training=True, batch_size=batch_size)
    loader = create_loader(
        dataset,
        (3, IMG_SIZE, IMG_SIZE),
        batch_size,
        is_training=True,
        auto_augment=rand_augment,
        color_jitter=None,
        interpolation="random",
        num_workers=0,
        device=torch.device("cpu"),
        persistent_workers=False,
    )
    while True:
        for images, _ in loader.loader:
            yield images


def make_transform(rand_augment: str | None) -> Any:
    """Make timm's transform to uint8, which the loaders other than timm's use."""
    return create_transform(
        IMG_SIZE,
        is_training=True,
        auto_augment=rand_augment,
        color_jitter=None,
        interpolation="random",
        use_prefetcher=True,
    )


def webdataset_batches(shards: Path, batch_size: int, rand_augment: str | None) -> Iterator[torch.Tensor]:
    urls = sorted(str(path) for path in (shards / "train").glob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode("pilrgb").to_tuple("jpg", "cls")
    dataset = dataset.map_tuple(make_transform(rand_augment), int).batched(batch_size, fast_collate, partial=False)
    while True:
        for images, _ in DataLoader(dataset, batch_size=None):
            yield images


def torchvision_batches(tree: Path, batch_size: int, rand_augment: str | None) -> Iterator[torch.Tensor]:
    dataset = ImageFolder(str(tree / "train"), make_transform(rand_augment))
    while True:
        for images, _ in DataLoader(dataset, batch_size, shuffle=True, collate_fn=fast_collate, drop_last=True):
            yield images


def measure_rate(batches: Iterator[torch.Tensor], num_batches: int) -> float:
    """Measure the images per CPU second over the next batches."""
    num_images, start = 0, time.process_time()
    for _ in range(num_batches):
        images = next(batches)
        assert images.shape[1:] == (3, IMG_SIZE, IMG_SIZE)
        assert images.dtype == torch.uint8
        num_images += len(images)
    return num_images / (time.process_time() - start)


def compare_rates(
    makers: dict[str, Callable[[str | None], Iterator[torch.Tensor]]],
    rand_augment: str | None,
    num_batches: int,
    num_rounds: int,
) -> dict[str, list[float]]:
    """Measure the images per CPU second of each loader, one number a round."""
    loaders = {name: make(rand_augment) for name, make in makers.items()}
    for batches in loaders.values():  # the first batch opens files and fills shuffle buffers
        next(batches)
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(num_rounds):
        for name, batches in loaders.items():
            rates[name].append(measure_rate(batches, num_batches))
    return rates


def print_rates(title: str, rates: dict[str, list[float]]) -> None:
    print(f"\n{title}\n{'':24}{'img/s per core':>16}{'us per image':>14}{'ours is quicker by':>20}")
    for name, of_rounds in rates.items():
        rate, ratio = statistics.median(of_rounds), median_ratio(rates["ours"], of_rounds)
        print(f"{name:24}{rate:16.0f}{1e6 / rate:14.0f}{ratio:19.2f}x")


def median_ratio(ours: list[float], others: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(ours, others, strict=True))


def find_misses(results: dict[str, Any]) -> list[str]:
    """Describe the bars that the results miss."""
    misses = []
    for name, (sense, bar) in BARS.items():
        value = results[name]
        if not (value >= bar if sense == ">=" else value <= bar):
            misses.append(f"{name} is {value:.3g}, not {sense} {bar}")
    return misses


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("data", __doc__, "fewer images and rounds")
    parser.add_argument("--images", type=int, help="JPEGs to make (default: 1536, or 256 with --quick)")
    parser.add_argument("--rounds", type=int, help="rounds of the throughput (default: 7, or 3 with --quick)")
    parser.add_argument("--epochs", type=int, help="epochs of the memory's run (default: 20, or 8 with --quick)")
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    for name, full, quick in (("images", 1536, 256), ("rounds", 7, 3), ("epochs", 20, 8)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, quick if arguments.quick else full)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    batch_size = arguments.batch_size
    with tempfile.TemporaryDirectory() as folder:
        tree, shards = Path(folder) / "tree", Path(folder) / "shards"
        num_bytes = make_photos(tree, arguments.images)
        print(f"{arguments.images} JPEGs of {num_bytes / arguments.images / 1000:.0f} kB, batches of {batch_size}")
        shard = [sys.executable, "-m", "data_prep.shard", str(tree), str(shards), "--shard-size", "256"]
        subprocess.run(shard, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        makers: dict[str, Callable[[str | None], Iterator[torch.Tensor]]] = {
            "ours": lambda policy: our_batches(shards, batch_size, policy),
            "timm, wds/": lambda policy: timm_batches("wds/", shards, batch_size, policy),
            "timm, folders": lambda policy: timm_batches("", tree, batch_size, policy),
            "webdataset": lambda policy: webdataset_batches(shards, batch_size, policy),
            "torchvision ImageFolder": lambda policy: torchvision_batches(tree, batch_size, policy),
        }
        results: dict[str, Any] = {"arguments": {name: str(value) for name, value in vars(arguments).items()}}
        recipe = make_config(batch_size, []).augment.rand_augment
        num_batches = arguments.images // batch_size
        for key, title, policy in (("rand_augment", recipe, recipe), ("plain", "without RandAugment", None)):
            rates = compare_rates(makers, policy, num_batches, arguments.rounds)
            print_rates(str(title), rates)
            results[f"rates_{key}"] = rates
            results[f"speedup_{key}"] = median_ratio(rates["ours"], rates["timm, wds/"])
        # As many lanes as leave each some runs, as the recipes' do on ImageNet.
        results |= measure_reads(shards, make_config(batch_size, ["data.lanes=4"]))
        config = make_config(batch_size, ["data.num_workers=2"])
        results |= measure_memory(open_source(shards, "train"), config, arguments.epochs)
        config = make_config(1024, ["data.num_workers=2", "data.lanes=1024"])
        make_large(shards / "train", Path(folder) / "large")
        results |= measure_boundary(Path(folder) / "large", config)
        results |= measure_resume(Path(folder) / "large", config)
        results |= measure_planning()
    print()
    for name in BARS:
        print(f"{name:24}{results[name]:10.3g}   bar {BARS[name][0]} {BARS[name][1]}")
    conclude(results, find_misses(results), arguments)


if __name__ == "__main__":
    main()
