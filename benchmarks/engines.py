"""What do the engines cost? `python -m benchmarks.engines [--quick] [--check] [--json FILE] [--only PARTS]`

    steps         time of a step beside ddp's: gc_vit_xxtiny at 224, 8 images a rank, fp32, two processes of one thread
                  each (on GPUs: one each). Each engine has its own processes; they take turns, a step each
    bytes         what a rank of these holds between backward and step, by category, beside the theory
    traffic       what a rank of these sends in a step of one and of two micro-steps, beside the theory
    activations   what modes of checkpointing free and cost: `benchmarks.engines_memory`
    startup       the most that a process takes while it builds its engine: `benchmarks.engines_memory`
    saves         what a checkpoint costs the steps around it: `benchmarks.engines_saves`

With `--processes 4` there is hsdp as well. With one GPU there can be only one process, which exchanges nothing: steps
and bytes are then those of the engines' own work, and no bar is set on them.
"""

import argparse
import os
import platform
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import engines_bytes, engines_memory, engines_saves, engines_steps
from benchmarks.command import conclude, make_parser
from benchmarks.engines_crew import crews, engine_names

PARTS = ("steps", "bytes", "traffic", "activations", "startup", "saves")
ON_CREWS = ("steps", "bytes", "traffic")

# How each part is measured (on crews or alone), printed, and compared with its bars.
HOW: dict[str, tuple[Callable[..., Any], Callable[[Any], None], Callable[[Any], list[str]]]] = {
    "steps": (engines_steps.measure_steps, engines_steps.print_steps, engines_steps.find_missed_steps),
    "bytes": (engines_bytes.measure_bytes, engines_bytes.print_bytes, engines_bytes.find_missed_bytes),
    "traffic": (engines_bytes.measure_traffic, engines_bytes.print_traffic, engines_bytes.find_missed_traffic),
    "activations": (
        engines_memory.measure_activations,
        engines_memory.print_activations,
        engines_memory.missed_activations,
    ),
    "startup": (engines_memory.measure_startup, engines_memory.print_startup, engines_memory.missed_startup),
    "saves": (engines_saves.measure_saves, engines_saves.print_saves, engines_saves.find_misses),
}


def choose_world_size(wanted: int) -> int:
    """Choose the number of processes: as many as wanted, or as there are GPUs if there are any."""
    return min(wanted, torch.cuda.device_count()) if torch.cuda.is_available() else wanted


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("engines", __doc__, "tiny models, few rounds")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)} (default: all)")
    parser.add_argument("--processes", type=int, choices=(1, 2, 4), default=2, help="per engine (default: 2)")
    parser.add_argument("--engines", help="only some of them, beside ddp: for trying things (default: all)")
    arguments = parser.parse_args()
    arguments.only = arguments.only.split(",")
    if unknown := set(arguments.only) - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    world_size = choose_world_size(arguments.processes)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {device}")
    results: dict[str, Any] = {"device": device, "torch": torch.__version__, "world_size": world_size}
    parts = [part for part in PARTS if part in arguments.only]
    if on_crews := [part for part in parts if part in ON_CREWS]:
        print(f"{world_size} processes an engine" + (": nothing is exchanged, no bars" if world_size == 1 else ""))
        names = [
            name
            for name in engine_names(world_size)
            if arguments.engines is None or name in ("ddp", *arguments.engines.split(","))
        ]
        with crews(names, world_size, arguments.quick) as found:
            for part in on_crews:
                results[part] = HOW[part][0](found, arguments.quick)
                HOW[part][1](results[part])
    for part in parts:
        if part not in ON_CREWS:
            print(f"\n{part}")
            results[part] = HOW[part][0](arguments.quick)
            HOW[part][1](results[part])
    barred = [part for part in parts if world_size > 1 or part not in ON_CREWS]
    misses = [miss for part in barred for miss in HOW[part][2](results[part])]
    verdict = "All bars are met." if barred else "No bar was set on any of this."
    conclude(results, misses, arguments, verdict)


if __name__ == "__main__":
    main()
