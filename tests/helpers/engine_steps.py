"""Share code of workers that step engines by hand: random micro-batches, a digest, and the frame of a worker."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gcvit.config.schema import Config
from gcvit.runtime.distributed import World, join_world
from gcvit.training.trainer import seed_drop_path


def draw_micro_batches(
    config: Config, world: World, generator: torch.Generator, step: int, num_micro_steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw images [b, 3, H, W] and soft targets [b, C] of this rank's micro-steps, with drop path seeded for each."""
    num_images, size = config.global_batch_size // world.size, config.model.img_size
    images = torch.randn(num_images, 3, size, size, generator=generator).to(world.device)
    targets = torch.randn(num_images, config.model.num_classes, generator=generator).softmax(1).to(world.device)
    micro_batches = zip(images.chunk(num_micro_steps), targets.chunk(num_micro_steps), strict=True)
    for micro_step, micro_batch in enumerate(micro_batches):
        seed_drop_path(config.seed, step, micro_step, world.rank)
        yield micro_batch


def digest(tensors: Iterable[Tensor]) -> str:
    """Compute the SHA-256 of the tensors' bytes, one after the other."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def report_to_file(run_all: Callable[[World], dict[str, Any]]) -> None:
    """Join the world, run, and let rank 0 write the result to the file that the command line names."""
    torch.set_num_threads(1)
    with join_world() as world:
        report = run_all(world)
        if world.is_rank0:
            Path(sys.argv[1]).write_text(json.dumps(report))
