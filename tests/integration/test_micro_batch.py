"""trainer.micro_batch_size=auto in real processes, on devices with an injected limit."""

import pytest
import torch

from gcvit.config.load import load_config
from gcvit.planning.micro_batch_finder import Trial
from gcvit.runtime.distributed import World
from tests.helpers.launching import ROOT, succeed, torchrun
from tests.helpers.limited_device import Limited
from tests.helpers.trainings import read_rows, write_noise

WORDS = ["trainer.micro_batch_size=auto", "global_batch_size=24"]


@pytest.fixture(scope="module")
def trial() -> Trial:
    config = load_config(ROOT / "tests/helpers/golden.yaml", WORDS)[0]
    return Trial(config, World(0, 1, torch.device("cpu"), None))  # type: ignore[arg-type]


def between(trial: Trial, world_size: int, smaller: int, larger: int) -> float:
    """A limit that the one is forecast to keep, and the other to exceed."""
    peaks = [trial._forecast.predict(trial._config, world_size, size).peak for size in (smaller, larger)]
    assert peaks[0] < peaks[1]
    return sum(peaks) / 2


def test_a_trial_runs_out_of_memory_and_recovers(trial):
    """What fits is what the forecast of the same step says."""
    before = torch.random.get_rng_state()
    for smaller, larger in ((12, 24), (2, 12)):
        with Limited(between(trial, 1, smaller, larger)) as device:
            found = [trial.fits(tried) for tried in (larger, smaller, larger, smaller)]
        assert found == [False, True, False, True]
        assert device.num_failures == 2
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.gpu
def test_a_trial_leaves_neither_memory_nor_random_numbers_behind(device):
    """On a GPU also after terabytes of images, for which no limit has to be injected."""
    config = load_config(ROOT / "tests/helpers/golden.yaml", WORDS)[0]
    trial = Trial(config, World(0, 1, device, None))  # type: ignore[arg-type]
    assert trial.fits(24)
    trial.end()
    before, generator = torch.cuda.memory_allocated(), torch.random.get_rng_state()
    assert trial.fits(24)
    if device.type == "cuda":
        assert not trial.fits(200_000_000)
        assert trial.fits(24)
    trial.end()
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(torch.random.get_rng_state(), generator)


@pytest.mark.dist
@pytest.mark.slow
def test_all_ranks_take_what_fits_the_smallest_and_keep_the_global_batch(trial, tmp_path):
    """Rank 1 has room for half of its share. What follows is the run that was told that number, step by step."""
    write_noise(tmp_path / "data")

    def start(tag, *words):
        limits = ["none", between(trial, 2, 6, 12)]
        command = [
            "tests/integration/micro_batch_worker.py",
            *limits,
            "--",
            "--config",
            "tests/helpers/golden.yaml",
        ]
        words = [f"output_dir={tmp_path}", "schedule.cosine=6 steps", "trainer.save_every=3 steps", *words]
        done = torchrun(2, *command, "--data_dir", tmp_path / "data", "--tag", tag, "global_batch_size=24", *words)
        return succeed(done).stdout + done.stderr

    told = start("auto", "trainer.micro_batch_size=auto", "schedule.cosine=3 steps")
    assert "trainer.micro_batch_size=auto: 6 of 12 images fit at once, 2 micro-step(s)" in told
    assert "micro_batch_size: 6" in (tmp_path / "auto/config.yaml").read_text()
    # The same command with more steps, now on devices that would hold more: it stays with what it had.
    trained = start("auto", "trainer.micro_batch_size=auto")
    assert "trainer.micro_batch_size=auto: 6, as the checkpoint had it" in trained
    start("six", "trainer.micro_batch_size=6", "schedule.cosine=3 steps")
    start("six", "trainer.micro_batch_size=6")
    losses = {tag: [row["loss"] for row in read_rows(tmp_path / tag) if "lr" in row] for tag in ("auto", "six")}
    assert len(losses["auto"]) == 6
    assert losses["auto"] == losses["six"]
