"""One checkpoint for all: every engine on 1, 2 and 4 processes saves, and engines on other numbers of processes go on.

Each of the sixteen trains 20 steps and leaves a checkpoint after step 10. That is loaded by itself, by fsdp on 2 and
by ZeRO-3 on 1; and all sixteen load that of fsdp on 2 and that of ZeRO-2 on 4. What is held after loading has the
digest of what was saved; the ten steps that follow have the losses of the run that was not interrupted.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from gcvit.checkpoint.store import open_checkpoint, read_tensors
from tests.helpers.golden_runs import ENGINES, train_all
from tests.integration.golden_worker import digest_tensors
from tests.integration.test_golden import images, read_run  # noqa: F401  (images is a fixture)

pytestmark = pytest.mark.dist

HSDP = [*ENGINES["fsdp"], "fsdp.shard_size=2"]
CHOICES = ENGINES | {"hsdp": HSDP}
# (engine, processes)
SAVERS = [(engine, size) for size in (1, 2, 4) for engine in ENGINES]
SAVERS.insert(-1, ("hsdp", 4))
FOR_ALL = [("fsdp", 2), ("zero2", 4)]
COMMON = ["trainer.eval_every=20 steps"]


def name_of(place: tuple[str, int]) -> str:
    return f"{place[0]}-on-{place[1]}"


# (saver, loader): a dict drops what would be done twice, and keeps the order.
LOADS = list(
    dict.fromkeys(
        [(saver, loader) for saver in SAVERS for loader in (saver, ("fsdp", 2), ("zero3", 1))]
        + [(saver, loader) for saver in FOR_ALL for loader in SAVERS]
    )
)
each_load = pytest.mark.parametrize(
    ("saver", "loader"), LOADS, ids=[f"{name_of(saver)}-to-{name_of(loader)}" for saver, loader in LOADS]
)


@pytest.fixture(scope="module")
def out(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """All runs, in one process group per number of processes: first those that save, then those that load."""
    folder = tmp_path_factory.mktemp("matrix")
    for size in (1, 2, 4):
        savers = [place for place in SAVERS if place[1] == size]
        runs = [{"tag": name_of(place), "overrides": CHOICES[place[0]] + COMMON} for place in savers]
        train_all(runs, size, images, folder)
    for size in (1, 2, 4):
        # In the order of the engines.
        loads = sorted((x for x in LOADS if x[1][1] == size), key=lambda x: SAVERS.index(x[1]))
        runs = [
            {
                "tag": f"{name_of(saver)}-to-{name_of(loader)}",
                "overrides": CHOICES[loader[0]] + COMMON,
                "resume": str(folder / name_of(saver) / "checkpoints" / "step_00000010"),
            }
            for saver, loader in loads
        ]
        train_all(runs, size, images, folder)
    return folder


@functools.cache
def digest_of(run: Path, step: int) -> str:
    found = open_checkpoint(run / "checkpoints" / f"step_{step:08d}")
    tensors = {
        f"{k}.{n}": t for k in ("model", "exp_avg", "exp_avg_sq", "ema") for n, t in read_tensors(found, k).items()
    }
    assert tensors.keys() == found.shapes.keys()
    return digest_tensors(tensors)


@pytest.mark.slow
@pytest.mark.parametrize("saver", SAVERS, ids=name_of)
def test_what_is_saved_is_what_was_held(saver, out):
    digests = json.loads((out / name_of(saver) / "digests.json").read_text())
    assert digest_of(out / name_of(saver), 20) == digests["end"]
    assert digest_of(out / name_of(saver), 10) != digests["end"]


@pytest.mark.slow
@each_load
def test_what_is_loaded_is_what_was_saved_and_the_run_goes_on(saver, loader, out):
    loaded = out / f"{name_of(saver)}-to-{name_of(loader)}"
    assert json.loads((loaded / "digests.json").read_text())["start"] == digest_of(out / name_of(saver), 10)
    whole, resumed = read_run(out / name_of(saver)), read_run(loaded)
    assert len(resumed.losses) == 10
    if saver == loader:
        assert resumed.losses.tolist() == whole.losses[10:].tolist()
        assert resumed.norms.tolist() == whole.norms[10:].tolist()
        digests = (json.loads((run / "digests.json").read_text())["end"] for run in (out / name_of(saver), loaded))
        assert next(digests) == next(digests)
    np.testing.assert_allclose(resumed.losses, whole.losses[10:], rtol=1e-6)
    np.testing.assert_allclose(resumed.norms, whole.norms[10:], rtol=1e-5)
