"""A sleep in each stage of each rank is named by every logging step: what bounds the run, and who."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from gcvit.monitoring.schema import STAGES, find_faults
from tests.helpers.launching import ROOT, succeed, torchrun
from tests.helpers.trainings import read_rows, write_noise

pytestmark = pytest.mark.dist

COMMON = ["global_batch_size=12", "data.lanes=2", "trainer.eval_every=90 steps", "trainer.keep_checkpoints=1"]
COMMON += ["ema=null", "model.overrides.width=8"]
ENGINES = {
    "ddp": ["engine=ddp"],
    "fsdp": ["engine=fsdp", "fsdp.unit_parameters=10000", "activation_checkpointing=full"],
    "zero2": ["engine=zero", "zero.stage=2", "trainer.micro_batch_size=4"],
    "zero3": ["engine=zero", "zero.stage=3"],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_noise(root)
    return root


def describe(engine: str, ranks: Sequence[int]) -> dict:
    """Each stage of each of these ranks in turn, a step and a row each."""
    cycle = len(STAGES) + 1
    plan = {}
    for place, rank in enumerate(ranks, start=2):
        first = cycle * place + 1  # before it: the start, and the first save, which takes memory and modules
        plan[first] = ("checkpoint", rank)  # the save that ends a step belongs to the next row
        # In the step between, it is written.
        plan |= {first + 2 + place: (stage, rank) for place, stage in enumerate(STAGES[:-1])}
    steps = [f"schedule.cosine={max(plan)} steps", "trainer.log_every=1 step", f"trainer.save_every={cycle} steps"]
    overrides = [*COMMON, *ENGINES[engine], *steps, "data.num_workers=0"]
    return {"tag": engine, "overrides": overrides, "named": plan, "plan": {step: [slow] for step, slow in plan.items()}}


def describe_loaders(world_size: int) -> dict:
    """Each stage of the loader processes in turn, two steps and a row each: they load the first of them ahead."""
    slow = [(stage, rank) for rank in range(world_size) for stage in STAGES[:4]]
    named = {2 * row + 2: slow[row - 1] for row in range(1, len(slow) + 1)}
    plan = {step: [here] for end, here in named.items() for step in (end - 1, end)}
    steps = [f"schedule.cosine={max(plan)} steps", "trainer.log_every=2 steps", "trainer.save_every=90 steps"]
    overrides = [*COMMON, *ENGINES["ddp"], *steps, "data.num_workers=2", "data.prefetch_batches=1"]
    seconds = dict.fromkeys(STAGES[:4], 1.5)
    return {"tag": "loaders", "overrides": overrides, "named": named, "plan": plan, "seconds": seconds}


def describe_overlap() -> dict:
    """Rank 0 decodes long at each micro-step, but its loader processes do it in time: rank 1 computes for longer."""
    plan = {step: [("decoding", 0), ("compute", 1)] for step in range(1, 10)}
    steps = [f"schedule.cosine={max(plan)} steps", "trainer.log_every=3 steps", "trainer.save_every=90 steps"]
    overrides = [*COMMON, *ENGINES["ddp"], *steps, "data.num_workers=2", "data.prefetch_batches=4"]
    named = {6: ("compute", 1), 9: ("compute", 1)}
    seconds = {"decoding": 0.5, "compute": 1.0}
    return {"tag": "overlap", "overrides": overrides, "named": named, "plan": plan, "seconds": seconds}


def train_all(runs: list[dict], world_size: int, images: Path, out: Path) -> None:
    spec = {"config": str(ROOT / "tests/helpers/golden.yaml"), "data": str(images), "out": str(out), "runs": runs}
    (out / "spec.json").write_text(json.dumps(spec))
    succeed(torchrun(world_size, "-m", "tests.integration.stalls_worker", out / "spec.json", timeout=900))


def check_all(runs: list[dict], out: Path) -> None:
    wrong = []
    for run in runs:
        rows = read_rows(out / run["tag"])
        assert not [fault for row in rows for fault in find_faults(row)]
        found = {row["step"]: row for row in rows if row["kind"] == "train"}
        for step, right in run["named"].items():
            if (found[step]["bound_by"], found[step]["slowest_rank"]) != right:
                wrong.append((run["tag"], right, found[step]))
    assert not wrong, "\n".join(map(str, wrong))


def test_a_sleep_is_named(images, tmp_path):
    runs = [describe("ddp", [1])]
    train_all(runs, 2, images, tmp_path)
    check_all(runs, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("engine", "world_size"), [*((engine, 2) for engine in ENGINES), ("fsdp", 3)])
def test_a_sleep_in_any_stage_of_any_rank_is_named(engine, world_size, images, tmp_path):
    runs = [describe(engine, range(world_size))]
    if engine == "ddp":  # what loader processes do is the same for all engines
        runs += [describe_loaders(world_size), describe_overlap()]
    train_all(runs, world_size, images, tmp_path)
    check_all(runs, tmp_path)
