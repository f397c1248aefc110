"""Runs a list of trainings inside one process group, to spare the start of many: `golden_worker.py SPEC.json`.

SPEC: {"config": FILE, "data": DIR, "out": DIR, "runs": [{"tag", "overrides", "resume"?, "sabotage"?}]}. Each run is the
real `gcvit.trainer.train`; its metrics and checkpoints stand in OUT/TAG.
"""

import json
import sys
from unittest import mock

import torch

from gcvit import optim
from gcvit.config_file import load_config
from gcvit.parallel.world import World, join_world
from gcvit.run import open_sources, start
from gcvit.trainer import train


def sabotage(kind: str | None) -> mock._patch:
    """A bug of the kind that the golden test must find."""
    if kind == "swapped decay groups":
        right = optim.decays
        return mock.patch.object(optim, "decays", lambda *a, **k: not right(*a, **k))
    if kind == "doubled gradient":
        from gcvit.parallel.ddp import DdpEngine

        right_backward = DdpEngine.backward
        return mock.patch.object(DdpEngine, "backward", lambda self, loss: right_backward(self, 2 * loss))
    assert kind is None, kind
    return mock.patch.object(optim, "BIAS_TABLE", optim.BIAS_TABLE)  # nothing


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
            start(config, world, open_sources(config), resume) as started,
        ):
            train(started)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    with join_world() as world:
        run_all(spec, world)
