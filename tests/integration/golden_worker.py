"""Runs a list of trainings inside one process group, to spare the start of many: `golden_worker.py SPEC.json`.

SPEC: {"config": FILE, "data": DIR, "out": DIR, "runs": [{"tag", "overrides", "resume"?, "sabotage"?}]}. Each run is the
real `Trainer.train`; metrics and checkpoints stand in OUT/TAG, and in digests.json the SHA-256 of all tensors
that its engine held when it started and when it ended.
"""

import hashlib
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from gcvit.config.load import load_config
from gcvit.data.source import open_sources
from gcvit.optim import adamw
from gcvit.runtime.distributed import World, join_world
from gcvit.training.ema import all_fragments
from gcvit.training.setup import build_trainer
from gcvit.training.trainer import Trainer


def sabotage(kind: str | None) -> mock._patch:
    """A bug of the kind that the golden test must find."""
    if kind == "swapped decay groups":
        right = adamw.decays
        return mock.patch.object(adamw, "decays", lambda *a, **k: not right(*a, **k))
    if kind == "doubled gradient":
        from gcvit.parallel.ddp import DdpEngine

        right_backward = DdpEngine.backward
        return mock.patch.object(DdpEngine, "backward", lambda self, loss: right_backward(self, 2 * loss))
    assert kind is None, kind
    return mock.patch.object(adamw, "BIAS_TABLE", adamw.BIAS_TABLE)  # nothing


def digest_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and bytes of whole tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest_state(trainer: Trainer) -> str:
    """Of all that the ranks hold together, put back into whole tensors; on every rank."""
    fragments = {
        f"{kind}.{n}": p for kind, parts in all_fragments(trainer.engine, trainer.ema).items() for n, p in parts.items()
    }
    held = {n: (p.start, p.shape.numel(), p.data.detach().cpu().numpy()) for n, p in fragments.items()}
    whole: dict[str, np.ndarray] = {}
    for of_rank in trainer.world.gather(held):
        for name, (begin, numel, values) in of_rank.items():
            whole.setdefault(name, np.full(numel, np.nan, np.float32))[begin : begin + len(values)] = values
    return digest_tensors({name: torch.from_numpy(values) for name, values in whole.items()})


def run_all(spec: dict, world: World) -> None:
    for run in spec["runs"]:
        overrides = [
            *run["overrides"],
            f"tag={run['tag']}",
            f"output_dir={spec['out']}",
            f"data.dir={spec['data']}",
        ]
        config, _ = load_config(spec["config"], overrides)
        resume = run.get("resume", "none")
        with (
            sabotage(run.get("sabotage")),
            build_trainer(config, world, open_sources(config.data, config.model.num_classes), resume=resume) as trainer,
        ):
            before = digest_state(trainer)
            trainer.train()
            digests = {"start": before, "end": digest_state(trainer)}
        if world.is_rank0:
            (Path(spec["out"]) / run["tag"] / "digests.json").write_text(json.dumps(digests))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    with join_world(deterministic=torch.cuda.is_available()) as world:
        run_all(spec, world)
