"""Predict how training would scale: `python -m benchmarks.scaling [--quick] [--check] [--json FILE] [--plot FILE] ...`

The tables show the predicted step of GC ViT-B and L on 8 to 1024 GPUs with each engine, the bandwidth that it needs
of the file system, and the time of a checkpoint. The same model then predicts published measurements. The speed of
one GPU comes from `benchmarks.model` (--model-json), or is assumed, and every table says which. The model itself is
`gcvit/planning/scaling.py`, and `docs/scaling.md` states its assumptions.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.command import conclude, make_parser
from gcvit.planning.collectives import A100_LINKS, H100_LINKS, Group, Links, Message, collective_seconds
from gcvit.planning.scaling import (
    OPERATION_SECONDS,
    UPDATE_BYTES,
    Part,
    Profile,
    Setup,
    can_shard,
    profile_variant,
    simulate_step,
)

ENGINES = ("ddp", "fsdp", "hsdp", "zero2", "zero3")
MODELS = {"gc_vit_base": "GC ViT-B", "gc_vit_large": "GC ViT-L"}
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
GLOBAL_BATCHES = (1024, 4096)  # of the published runs
MICRO_BATCH = 32  # of the configs for several nodes
ROOM = 128  # images at once that a GPU is given at most; the configs for one node have as many

# What collectives reach, one way, by GPU. Each number's source stands in docs/scaling.md.
PRESETS: dict[str, Links] = {
    "h100": H100_LINKS,
    "a100": A100_LINKS,
    "ethernet": replace(H100_LINKS, network=12e9 / 8),  # 1 x 100 Gb/s a node
}
TFLOPS = {"h100": 790.0, "a100": 312.0, "ethernet": 790.0}  # of bf16 products: measured; by the data sheet

IMAGE_BYTES = 147_897_477_120 / 1_281_167  # ImageNet-1K's training archive by its images: what a shard holds of one
IMAGES_PER_CORE = 410  # a second, with RandAugment: benchmarks/RESULTS.md, "The loader"
STATE_BYTES = 4 * 4  # a parameter's, its two moments' and its EMA's in a checkpoint

NEMO_URL = (
    "https://docs.nvidia.com/nemo-framework/user-guide/latest/MultimodalModels/VisionLanguageFoundation/Vit/Perf.html"
)
NEMO_NODES = (1, 2, 4, 8, 16)
NEMO_IMAGES = {"a100": (693, 1347, 2642, 5454, 10644), "h100": (1428, 2846, 5737, 11222, 21561)}  # a second
NEMO_BAR = 0.05  # of the speed-up on 16 nodes of 8 A100

# (preset, GPUs, bytes, kind, measured seconds, source); busbw turned into seconds where only that was published.
COLLECTIVES = (
    ("a100", 8, 2**30, "all_reduce", 8142.6e-6, "NVIDIA/nccl/issues/527, p4d"),
    ("a100", 24, 133_169_160, "all_reduce", 2660.4e-6, "NVIDIA/nccl-tests/issues/119, 4 x 200 Gb/s"),
    ("a100", 256, 8, "all_reduce", 62.99e-6, "NVIDIA/nccl/issues/652, 4 x 200 Gb/s"),
    ("h100", 128, 8, "all_reduce", 61.98e-6, "NVIDIA/nccl/issues/1469"),
    ("h100", 128, 2**26, "all_reduce", 2 * 127 / 128 * 2**26 / 150e9, "NVIDIA/nccl/issues/1469, 150 GB/s"),
    ("h100", 256, 2**31, "all_reduce", 2 * 255 / 256 * 2**31 / 340e9, "NVIDIA/nccl/issues/1218, 340 GB/s"),
    ("h100", 256, 2**31, "all_gather", 255 / 256 * 2**31 / 200e9, "NVIDIA/nccl/issues/1218, 200 GB/s"),
)


@dataclass(frozen=True)
class Speed:
    """Describe the speed of one GPU that trains alone."""

    images_per_s: float  # at a batch that fills it
    num_operations: int  # of a step, each of which takes the host --operation-us
    source: str


def read_speed(variant: str, profile: Profile, arguments: argparse.Namespace) -> Speed:
    """Return the measured speed of a variant, or else an assumed one."""
    if arguments.model_json is not None:
        found = json.loads(arguments.model_json.read_text())
        for contest in found["contests"]:
            if contest["variant"] == variant:
                rows = {name: row for name, row in contest["modes"]["training"].items() if not name.startswith("timm")}
                name, row = max(rows.items(), key=lambda item: item[1]["images_per_s"])
                num_kernels = row["num_kernels"] or profile.num_operations
                return Speed(row["images_per_s"], num_kernels, f"measured: {name}, {found['device']}")
    rate = arguments.mfu * 1e12 * arguments.tflops / (3 * profile.flops)
    return Speed(rate, profile.num_operations, f"ASSUMED: MFU {arguments.mfu:g} of {arguments.tflops:g} TFLOP/s")


def make_setup(num_gpus: int, images_per_gpu: float, speed: Speed, arguments: argparse.Namespace) -> Setup:
    """Split the images into micro-steps that fit a GPU; none is shorter than the host needs to launch it."""
    num_micro_steps = -int(-images_per_gpu // arguments.room)
    computing = images_per_gpu / num_micro_steps / speed.images_per_s
    launching = speed.num_operations * arguments.operation_us * 1e-6
    return Setup(num_gpus, max(computing, launching), num_micro_steps, arguments.reshard)


def predict(
    profile: Profile, speed: Speed, links: Links, global_batch: int | None, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Predict each engine's step, efficiency and traffic by number of GPUs; with no global batch, 32 images a GPU.

    Efficiency is the speed over that of as many GPUs which each train alone with a batch that fills them.
    """
    rows = []
    for num_gpus in arguments.gpus:
        images = arguments.micro_batch * num_gpus if global_batch is None else global_batch
        setup = make_setup(num_gpus, images / num_gpus, speed, arguments)
        engines = {}
        for engine in ENGINES:
            if engine == "fsdp" and not can_shard(profile, num_gpus):
                continue
            step = simulate_step(engine, profile, setup, links)
            engines[engine] = {
                "seconds": step.seconds,
                "efficiency": images / step.seconds / (num_gpus * speed.images_per_s),
                "sent_bytes": step.sent,
                "messages": len(step.messages),
            }
        best = min(row["seconds"] for row in engines.values())
        # Differences below 1 % are within the error of the prediction.
        fastest = [engine for engine, row in engines.items() if row["seconds"] <= 1.01 * best]
        rows.append({"gpus": num_gpus, "images": images, "engines": engines, "fastest": fastest, "seconds": best})
    return rows


def print_steps(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    print(f"{'GPUs':>5}{'images':>8}" + "".join(f"{engine:>16}" for engine in ENGINES) + "   fastest, within 1 %")
    for row in rows:
        cells = [
            f"{1e3 * found['seconds']:8.1f} ms{found['efficiency']:5.0%}" if found else f"{'refused':>16}"
            for found in map(row["engines"].get, ENGINES)
        ]
        print(f"{row['gpus']:5}{row['images']:8}" + "".join(cells) + "   " + ", ".join(row["fastest"]))


def print_traffic(rows: list[dict[str, Any]]) -> None:
    print("\nsent by a GPU in such a step, MB in a ring, and messages")
    print(f"{'GPUs':>5}{'':8}" + "".join(f"{engine:>16}" for engine in ENGINES))
    for row in rows:
        cells = [
            f"{found['sent_bytes'] / 1e6:11,.0f}{found['messages']:5}" if found else f"{'refused':>16}"
            for found in map(row["engines"].get, ENGINES)
        ]
        print(f"{row['gpus']:5}{'':8}" + "".join(cells))


def print_storage(profile: Profile, rows: list[dict[str, Any]], links: Links, arguments: argparse.Namespace) -> None:
    size = STATE_BYTES * profile.num_parameters
    reading = f"images of {IMAGE_BYTES:,.0f} bytes, of which a core decodes {IMAGES_PER_CORE} a second"
    print(f"\nwith the fastest engine; {reading};")
    writing = f"{arguments.node_write_gbs:g} GB/s a node, {arguments.write_gbs:g} GB/s in all"
    print(f"a checkpoint of {size / 1e9:.2f} GB, written at {writing} (ASSUMED)")
    print(f"{'GPUs':>5}{'img/s':>12}{'GB/s read':>11}{'a node':>8}{'cores a GPU':>13}{'epoch':>10}{'checkpoint':>12}")
    for row in rows:
        num_nodes = max(1, row["gpus"] // links.gpus_per_node)
        rate = row["images"] / row["seconds"]
        read = rate * IMAGE_BYTES / 1e9
        write = min(arguments.write_gbs, num_nodes * arguments.node_write_gbs)
        print(
            f"{row['gpus']:5}{rate:12,.0f}{read:11.2f}{read / num_nodes:8.2f}"
            f"{rate / row['gpus'] / IMAGES_PER_CORE:13.1f}{1_281_167 / rate:8.1f} s{size / 1e9 / write:10.2f} s"
        )


# ---- published measurements ----------------------------------------------------------------------


def make_vit_g() -> Profile:
    """Make the ViT-g/14 that NeMo trains: 40 layers of width 1408 and 6144; 1,009 of its 1,011 M parameters."""
    layer = Part(((3 * 1408, 1408), (1408, 1408), (6144, 1408), (1408, 6144)), 1.0)
    return Profile((layer,) * 40, (), 0)


def predict_nemo(preset: str, global_batch: int | None) -> list[float]:
    """Predict the speed-ups on 2 to 16 nodes from the speed on one.

    NeMo's configuration: gradients summed in fp32 in pieces of 125 MB while backward goes on, Adam on every GPU, 64
    images at once. The page does not name the global batch: 64 a GPU, or 4096 as in the configuration.
    """
    profile, links, update = make_vit_g(), PRESETS[preset], UPDATE_BYTES  # no EMA

    def step_seconds(num_nodes: int, image_seconds: float) -> tuple[float, float]:
        num_gpus = 8 * num_nodes
        images = 64 * num_gpus if global_batch is None else global_batch
        num_micro_steps = -(-images // (64 * num_gpus))
        micro_seconds = images / num_gpus / num_micro_steps * image_seconds
        setup = Setup(num_gpus, micro_seconds, num_micro_steps, buckets=(125e6, 125e6), update_bytes=update)
        return simulate_step("ddp", profile, setup, links).seconds, images

    low, high = 0.0, 1.0  # bisected: seconds of computing an image on a GPU, with which one node has its measured speed
    for _ in range(60):
        middle = (low + high) / 2
        seconds, images = step_seconds(1, middle)
        low, high = (low, middle) if images / seconds < NEMO_IMAGES[preset][0] else (middle, high)
    rates = []
    for num_nodes in NEMO_NODES:
        seconds, images = step_seconds(num_nodes, low)
        rates.append(images / seconds)
    return [rate / rates[0] for rate in rates]


def check_published() -> tuple[dict[str, Any], list[str]]:
    """Print predictions beside published measurements; return both, and the missed bars."""
    print(f"\nViT-g/14 with NeMo, speed-up over one node of 8 GPUs; measured:\n{NEMO_URL}")
    print(f"{'nodes':>22}" + "".join(f"{num_nodes:8}" for num_nodes in NEMO_NODES))
    result: dict[str, Any] = {"nemo": {}}
    misses = []
    for preset, images in NEMO_IMAGES.items():
        found = {
            "measured": [rate / images[0] for rate in images],
            "64 a GPU": predict_nemo(preset, None),
            "4096 in all": predict_nemo(preset, 4096),
            "without any loss": [float(n) for n in NEMO_NODES],
        }
        result["nemo"][preset] = found
        for name, ups in found.items():
            error = ups[-1] / found["measured"][-1] - 1
            print(
                f"{preset + ' ' + name:>22}" + "".join(f"{up:8.2f}" for up in ups) + f"   {error:+.1%}" * (error != 0)
            )
            if preset == "a100" and name[0].isdigit() and abs(error) > NEMO_BAR:
                misses.append(f"NeMo's 16 nodes of A100, {name}: {error:+.1%}, bar {NEMO_BAR:.0%}")
    print("\ncollectives: measured and predicted, in ms")
    result["collectives"] = []
    for preset, num_gpus, num_bytes, kind, measured, source in COLLECTIVES:
        links = PRESETS[preset]
        if "4 x 200" in source:
            links = replace(links, network=12e9)
        message = Message(kind, num_bytes, Group(max(1, num_gpus // 8), 8))
        seconds = collective_seconds(message, links)
        print(
            f"{preset:>6}{num_gpus:5} GPUs{kind:>12}{num_bytes:15,} bytes{1e3 * measured:9.3f}{1e3 * seconds:9.3f}"
            f"{seconds / measured - 1:+7.0%}   {source}"
        )
        result["collectives"].append({"source": source, "measured": measured, "predicted": seconds})
    return result, misses


# ---- plot ----------------------------------------------------------------------------------------


def draw(results: dict[str, Any], path: Path, subtitle: str) -> None:
    """Plot efficiency against the number of GPUs, a panel for each model: 32 images a GPU, and 1024 in all."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(ENGINES, ("#1b6ca8", "#d1495b", "#2e933c", "#8a5a9e", "#c77d11"), strict=True))
    figure, panels = plt.subplots(1, len(results), figsize=(5.6 * len(results), 5), sharey=True, squeeze=False)
    for panel, (variant, found) in zip(panels[0], results.items(), strict=True):
        ends = []
        for engine, colour in colours.items():
            rows = [row for row in found["steps"]["micro-batch"] if engine in row["engines"]]
            gpus, shares = [r["gpus"] for r in rows], [100 * r["engines"][engine]["efficiency"] for r in rows]
            panel.plot(gpus, shares, color=colour, marker="o", markersize=3.5, linewidth=1.8)
            ends.append((shares[-1], engine, colour))
        rows = found["steps"]["1024"]
        shares = [100 * max(e["efficiency"] for e in row["engines"].values()) for row in rows]
        panel.plot([row["gpus"] for row in rows], shares, color="#777777", linestyle="--", linewidth=1.4)
        ends.append((shares[-1], "1024 in all", "#777777"))
        place = -100.0
        for share, label, colour in sorted(ends):  # from below, each far enough above the last
            place = max(share, place + 4.5)
            panel.annotate(
                label, (rows[-1]["gpus"], place), (8, 0), textcoords="offset points", color=colour, va="center"
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks([row["gpus"] for row in rows], [str(row["gpus"]) for row in rows])
        panel.set_xlim(rows[0]["gpus"] / 1.2, rows[-1]["gpus"] * 3.2)
        panel.set_ylim(0, 105)
        panel.set_xlabel("GPUs")
        panel.set_title(MODELS[variant], loc="left", fontsize=12)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("efficiency, %")
    figure.suptitle(subtitle, fontsize=10, x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


# ---- command line --------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("scaling", __doc__, "one model, three sizes")
    parser.add_argument("--plot", type=Path, help="draw efficiencies into this file (.png, .svg); needs matplotlib")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--gpus", nargs="+", type=int, default=GPUS, help="fewer than 8, or full nodes of 8")
    parser.add_argument("--model-json", type=Path, help="what benchmarks.model --json wrote on a GPU")
    parser.add_argument("--mfu", type=float, default=0.30, help="assumed without it (default: 0.30)")
    parser.add_argument(
        "--tflops", type=float, help="of bf16 products, by which MFU is counted (default: the preset's)"
    )
    parser.add_argument(
        "--operation-us",
        type=float,
        default=1e6 * OPERATION_SECONDS,
        help="of the host, to launch a kernel (default: 5)",
    )
    parser.add_argument(
        "--links",
        choices=PRESETS,
        default="h100",
        help="h100 with 8 x 400 Gb/s a node, a100 with 8 x 200, or ethernet: h100 with 1 x 100 (default: h100)",
    )
    parser.add_argument("--nvlink-gbs", type=float, help="in place of the preset's: GB/s of a GPU, one way")
    parser.add_argument("--network-gbs", type=float, help="likewise, a GPU's share of its node's network")
    parser.add_argument("--micro-batch", type=int, default=MICRO_BATCH, help="images a GPU that the first table fixes")
    parser.add_argument("--room", type=int, default=ROOM, help="images that a GPU takes at once, at most")
    parser.add_argument("--reshard", action="store_true", help="fsdp.reshard_after_forward=true")
    parser.add_argument("--node-write-gbs", type=float, default=2.0, help="of a checkpoint, assumed (default: 2)")
    parser.add_argument("--write-gbs", type=float, default=10.0, help="of the file system, assumed (default: 10)")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.gpus = arguments.models[:1], (8, 64, 1024)
    if odd := [n for n in arguments.gpus if n < 2 or (n > 8 and n % 8)]:
        parser.error(f"--gpus: {odd} do not fill nodes of 8")
    if arguments.model_json and json.loads(arguments.model_json.read_text())["device"].startswith("CPU"):
        parser.error("--model-json: measured on a CPU, which says nothing of GPUs")
    arguments.tflops = arguments.tflops or TFLOPS[arguments.links]
    return arguments


def main() -> None:
    arguments = parse_arguments()
    links = PRESETS[arguments.links]
    if arguments.nvlink_gbs:
        links = replace(links, nvlink=1e9 * arguments.nvlink_gbs)
    if arguments.network_gbs:
        links = replace(links, network=1e9 * arguments.network_gbs)
    print(f"links {arguments.links}: NVLink {links.nvlink / 1e9:g} GB/s, network {links.network / 1e9:g} GB/s a GPU")
    results: dict[str, Any] = {}
    for variant in arguments.models:
        profile = profile_variant(variant)
        speed = read_speed(variant, profile, arguments)
        found: dict[str, Any] = {"speed": asdict(speed), "steps": {}}
        print(f"\n== {variant}, one GPU alone: {speed.images_per_s:,.0f} img/s, {speed.source} ==")
        for batch in (None, *GLOBAL_BATCHES):
            rows = predict(profile, speed, links, batch, arguments)
            found["steps"]["micro-batch" if batch is None else str(batch)] = rows
            title = f"{arguments.micro_batch} images a GPU" if batch is None else f"{batch} images in all"
            print_steps(f"{variant}, {title}, {arguments.links}, {speed.source}", rows)
        rows = found["steps"]["micro-batch"]
        print_traffic(rows)
        print_storage(profile, rows, links, arguments)
        results[variant] = found
    published, misses = check_published()
    if arguments.plot:
        source = next(iter(results.values()))["speed"]["source"]
        what = f"{arguments.micro_batch} images a GPU (dashed: the fastest engine with 1024 images in all)"
        draw(results, arguments.plot, f"Predicted efficiency, {what}\n{arguments.links}, {source}")
    inputs = {"links": asdict(links), "mfu": arguments.mfu, "tflops": arguments.tflops}
    conclude({"inputs": inputs, "models": results, "published": published}, misses, arguments)


if __name__ == "__main__":
    main()
