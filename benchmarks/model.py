"""How fast is the model beside timm's? `python -m benchmarks.model [--quick] [--check] [--json FILE] [--profile FILE]`

GC ViT at 224 with random images: ours with each of its attention paths against timm's of the same variant, eager and
compiled, taking turns; forward, and training steps (forward, loss, backward and AdamW) with the published drop path at
the same batch. On a CPU in fp32, 8 images, gc_vit_xxtiny and gc_vit_tiny, compiled only with --compile, since that
takes minutes; on a GPU under bf16 autocast, 128 images or half as many until all fit, gc_vit_base and gc_vit_large.

"ours" is the path that attention=auto takes. MFU is 3 times the counted FLOPs of a forward pass per training step (once
for forward), over the rate of a large matrix product measured in the same rounds. Peak memory is the contender's own,
weights and moments included. Some releases of timm let the images of a batch share their queries wrongly; they take as
long as the right ones.
"""

import argparse
import datetime
import gc
import json
import os
import platform
from typing import Any

import timm
import torch

from benchmarks.command import conclude, make_parser
from benchmarks.model_check import check_paths
from benchmarks.model_contest import MODES, OURS, SKIPPING, Entry, hold_contest
from gcvit.model.attention import HAS_TRITON, WindowAttention
from gcvit.model.variants import VARIANTS

CPU_BARS = {"gc_vit_xxtiny": 1.05, "gc_vit_tiny": 1.05}  # a training step beside timm's, eager and compiled, at least
GPU_MFU_BARS = {"gc_vit_base": 0.25, "gc_vit_large": 0.30}  # training, compiled, at least
GPU_EAGER_BAR, GPU_COMPILED_BAR = 2.5, 1.5  # our compiled training beside timm's eager and compiled, at least
GPU_MEMORY_BAR = 0.6  # of timm's peak, the lower of eager and compiled, at most


def find_auto_path(device: torch.device) -> str:
    with torch.device("meta"):
        attention = WindowAttention(32, 1, 7, uses_global_queries=False)
    return attention.choose_path(torch.empty(0, device=device))


def list_paths(device: torch.device) -> list[str]:
    """List our attention paths that this device supports, that of attention=auto first."""
    paths = [path for path in OURS if path != "triton" or (HAS_TRITON and device.type == "cuda")]
    return sorted(paths, key=lambda path: path != find_auto_path(device))


def list_entries(device: torch.device, *, is_compiling: bool, is_capturing: bool) -> list[Entry]:
    paths = list_paths(device)
    entries = [Entry(kind) for kind in (*paths, SKIPPING, "timm")]
    if is_compiling:
        # A compiled path that auto does not take answers no question that is worth its minutes on a CPU.
        compiled = [*paths, SKIPPING] if device.type == "cuda" else paths[:1]
        entries += [Entry(kind, is_compiled=True) for kind in ("timm", *compiled)]
    if is_capturing:  # last: a capture that fails may take the device's random numbers with it
        entries += [Entry(paths[0], is_compiled=is_compiling, is_captured=True)]
    return entries


def run_contest(variant: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Run the contest of a variant, and halve the batch as long as the device's memory is too small."""
    entries = list_entries(device, is_compiling=arguments.compile, is_capturing=arguments.graphs)
    batch_size = arguments.batch_size
    while True:
        try:
            result = hold_contest(
                variant,
                entries,
                device,
                batch_size=batch_size,
                num_rounds=arguments.rounds,
                runs_per_turn=10 if device.type == "cuda" and not arguments.quick else 1,
                trace=f"{arguments.profile}.{variant}.json" if arguments.profile else None,
            )
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            print(f"{variant}: {batch_size} images do not fit, taking half as many")
            batch_size //= 2
        else:
            return result | {"auto": find_auto_path(device)}
        # Outside of the handler: the error held the models.
        gc.collect()
        torch.cuda.empty_cache()


def print_contest(result: dict[str, Any]) -> None:
    rate = result["product_rate"] / 1e12
    print(f"\n{result['variant']}, batch {result['batch_size']}, matrix product {rate:.3g} TFLOP/s")
    print(f"{'':34}{'x timm':>8}{'x timm compiled':>17}{'img/s':>9}{'MFU':>7}{'peak GB':>14}{'kernels':>14}")
    for mode in MODES:
        for name, row in result["modes"][mode].items():
            eager, compiled = (row["ratios"].get(other) for other in ("timm", "timm compiled"))
            peak, kernels = row["peak_bytes"], row["num_kernels"]
            label = f"{mode} {name}" + (" (auto)" if name.split()[0] == result["auto"] else "")
            print(
                f"{label:34}{eager or float('nan'):8.3f}"
                f"{'-' if compiled is None else f'{compiled:.3f}':>17}"
                f"{row['images_per_s']:9.1f}{row['mfu']:7.1%}"
                f"{'not measured' if peak is None else f'{peak / 1e9:.2f}':>14}"
                f"{'not measured' if kernels is None else kernels:>14}"
            )
    for name, error in result["failed"].items():
        print(f"{name} failed: {error}")
    if "most expensive" in result:
        print("the ten most expensive operations of our training step: ms, calls")
        for name, milliseconds, num_calls in result["most expensive"]:
            print(f"    {milliseconds:9.2f} {num_calls:6d}  {name[:90]}")


def find_misses(result: dict[str, Any], device: torch.device) -> list[str]:
    """Describe the bars that a contest missed. A bar that was not measured counts as missed."""
    variant, auto, rows = result["variant"], result["auto"], result["modes"]["training"]
    was_compiled = any(name.endswith("compiled") for name in [*rows, *result["failed"]])
    checks: list[tuple[str, float | None, str, float]] = []
    if device.type == "cpu" and variant in CPU_BARS:
        for suffix in ("", " compiled") if was_compiled else ("",):
            ratio = rows.get(f"{auto}{suffix}", {}).get("ratios", {}).get(f"timm{suffix}")
            checks.append((f"x timm{suffix}", ratio, ">=", CPU_BARS[variant]))
    if device.type == "cuda" and variant in GPU_MFU_BARS:
        ours = rows.get(f"{auto} compiled", {})
        peaks = [rows[name]["peak_bytes"] for name in ("timm", "timm compiled") if name in rows]
        memory = ours["peak_bytes"] / min(peaks) if ours and peaks else None
        checks += [
            ("x timm", ours.get("ratios", {}).get("timm"), ">=", GPU_EAGER_BAR),
            ("x timm compiled", ours.get("ratios", {}).get("timm compiled"), ">=", GPU_COMPILED_BAR),
            ("MFU", ours.get("mfu"), ">=", GPU_MFU_BARS[variant]),
            ("peak memory x timm's", memory, "<=", GPU_MEMORY_BAR),
        ]
    return [
        f"{variant} training: {what} is {'not measured' if value is None else f'{value:.3f}'}, bar {sense} {bar}"
        for what, value, sense, bar in checks
        if value is None or not (value >= bar if sense == ">=" else value <= bar)
    ]


def parse_arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = make_parser("model", __doc__, "2 images, 2 rounds")
    parser.add_argument(
        "--profile", help="write traces of a training step to FILE.VARIANT.json, print its most expensive ops"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=on_gpu, help="(default: on GPUs)")
    if on_gpu:
        parser.add_argument("--graphs", action="store_true", help="one more contender: a whole step as one CUDA graph")
    else:
        parser.set_defaults(graphs=False)
    parser.add_argument("--models", nargs="+", choices=list(VARIANTS), help="(default: those that have bars)")
    parser.add_argument("--batch-size", type=int, help="(default: 8 on a CPU, 128 on a GPU)")
    parser.add_argument("--rounds", type=int, help="(default: 9)")
    arguments = parser.parse_args()
    arguments.models = arguments.models or list(GPU_MFU_BARS if on_gpu else CPU_BARS)
    arguments.batch_size = arguments.batch_size or (2 if arguments.quick else 128 if on_gpu else 8)
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 9)
    if odd := [name for name in arguments.models if VARIANTS[name].img_size != 224]:
        parser.error(f"--models: {', '.join(odd)} is not for images of 224")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    versions = {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"{datetime.date.today()}, {where}{threads}, " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    verdicts = check_paths(list_paths(device), device)
    print("attention beside the reference in float64, outputs and gradients:")
    print("\n".join(f"    {verdict}" for verdict in verdicts))
    results, misses = [], [f"attention: {verdict}" for verdict in verdicts if not verdict.is_right]
    for variant in arguments.models:
        results.append(run_contest(variant, arguments, device))
        print_contest(results[-1])
        misses += find_misses(results[-1], device)
        gc.collect()
        found = {"device": where, "date": str(datetime.date.today()), **versions, "contests": results}
        if arguments.json:  # after each, so that an error in a later one loses none
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    conclude(found, misses, arguments, "All bars that apply are met.")


if __name__ == "__main__":
    main()
