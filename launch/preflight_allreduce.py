"""Check before a job starts that its processes reach one another, how fast, and that checkpoints have room.

    python launch/preflight_allreduce.py ANSWERS ENTRY ARGUMENT...    in each process; see preflight.sh

Each process creates ANSWERS/HOST.LOCAL_RANK.came before an all-reduce, which waits for all. Exit code 2: no room for
the checkpoints, or a wrong command.
"""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from preflight import host, read_command

from gcvit.errors import UserError
from gcvit.runtime.entrypoint import run_main


def reduce(answers: Path, entry: str, arguments: list[str]) -> None:
    rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": os.environ["SLURM_LOCALID"]}
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["SLURM_LOCALID"]))
        torch.cuda.set_device(device)
    (answers / f"{host()}.{os.environ['LOCAL_RANK']}.came").touch()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    numbers = torch.ones((64 if device.type == "cuda" else 4) << 20, device=device)
    dist.all_reduce(numbers)  # opens the connections; not timed
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    dist.all_reduce(numbers)
    total = numbers[-1].item()  # waits for it
    seconds = time.perf_counter() - begin
    if total != size**2:
        raise RuntimeError(f"an all-reduce of ones over {size} processes gives {total}, not {size}^2")
    if rank == 0:
        # The bytes that each process sends and receives in a ring.
        speed = 2 * (size - 1) / size * numbers.nbytes / 1e9 / seconds
        print(f"pre-flight: all-reduce over {size} x {device.type}: {speed:.2f} GB/s", file=sys.stderr)
        _, config = read_command(entry, arguments)
        if config is not None:
            check_room(config)
    dist.destroy_process_group()


def check_room(config: Any) -> None:
    """Check the room for the checkpoints that a run keeps: masters, two moments and the EMA, in fp32.

    Raises:
        UserError: if there is not enough.
    """
    from gcvit.model import create_model  # loads timm, in one process

    given = config.model.overrides.model_dump(exclude_none=True) if config.model.overrides else {}
    with torch.device("meta"):
        model = create_model(
            config.model.name, num_classes=config.model.num_classes, img_size=config.model.img_size, **given
        )
    num_bytes = 4 * sum(p.numel() for p in model.parameters()) * (4 if config.ema else 3)
    there = len(list(Path(config.output_dir, config.tag, "checkpoints").glob("step_*")))
    num_more = max(
        config.trainer.keep_checkpoints + 2 - there, 1
    )  # beside the kept: the best, and the one being written
    free = shutil.disk_usage(config.output_dir).free
    words = f"{num_more} checkpoints of {num_bytes / 1e9:.3g} GB, {free / 1e9:.3g} GB free in {config.output_dir}"
    if num_more * num_bytes > free:
        hint = "set output_dir, or lower trainer.keep_checkpoints"
        raise UserError("there is no room for the checkpoints", got=words, hint=hint)
    print(f"pre-flight: room for {words}", file=sys.stderr)


def main() -> None:
    os.environ.pop("GCVIT_REPORT_DIR", None)  # for the reports of the training itself
    answers, entry, *arguments = sys.argv[1:]
    reduce(Path(answers), entry, arguments)


if __name__ == "__main__":
    run_main(main)
