"""What a training tells while it runs: two starts of one real run, with W&B's stand-in, and all that they leave."""

import contextlib
import gzip
import json
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gcvit.monitoring.schema import STAGES, find_faults
from tests.helpers.launching import ROOT, environment, succeed, torchrun
from tests.helpers.norms_worker import STAGES as PARTS
from tests.helpers.trainings import read_rows, write_noise

pytestmark = [pytest.mark.dist, pytest.mark.slow]

FAKES = ROOT / "tests/integration/fake_wandb"
KEY = "SECRET0123456789"
NUM_STEPS, PROFILE = 8, "2:2"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """For images in data/, the run in live/, W&B's calls in calls, and what the starts say in log and in screen."""
    place = tmp_path_factory.mktemp("live")
    write_noise(place / "data", train=12, val=2)
    (place / "data/train/class_0/0.png").write_bytes(b"no picture")
    return place


def words(place: Path, *others: str) -> list[str]:
    flags = ["--config", "tests/helpers/golden.yaml", "--data_dir", str(place / "data"), "--tag", "live"]
    return ["train.py", *flags, f"output_dir={place}", "schedule.cosine=8 steps", "wandb=true", *others]


@pytest.fixture(scope="module")
def run_dir(place) -> Path:
    """Four steps of two processes, whose output is a file; then the rest by one, in a terminal."""
    online = {"PYTHONPATH": f"{ROOT}:{FAKES}", "FAKE_WANDB_LOG": str(place / "calls"), "WANDB_API_KEY": KEY}
    common = ["trainer.save_every=4 steps", "data.max_corrupt_fraction=0.1"]
    done = torchrun(2, *words(place, *common, f"trainer.profile={PROFILE}"), **online)
    (place / "log").write_text(succeed(done).stderr)
    # As a kill after the first save would have left it: rows and a checkpoint of four steps.
    for path in (place / "live/checkpoints").iterdir():
        if path.name != "step_00000004":
            path.rename(place / path.name)
    with terminal(place / "screen") as screen:
        command = [sys.executable, *words(place, *common)]
        subprocess.run(
            command, cwd=ROOT, env={**environment(), **online}, stderr=screen, stdout=screen, timeout=300, check=True
        )
    return place / "live"


@contextlib.contextmanager
def terminal(path: Path) -> Iterator[int]:
    """A terminal, whose screen goes to a file."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    with subprocess.Popen(["cat"], stdin=ours, stdout=path.open("wb"), stderr=subprocess.DEVNULL) as reader:
        os.close(ours)
        yield theirs
        os.close(theirs)
        reader.wait(60)


def calls(place: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (place / "calls").read_text().splitlines()]
    return [row for row in rows if row.pop("call") == kind]


def test_rows_are_those_of_the_schema(run_dir):
    rows = read_rows(run_dir)
    assert [fault for row in rows for fault in find_faults(row)] == []
    steps = {
        kind: [row["step"] for row in rows if row["kind"] == kind] for kind in ("start", "train", "corruption", "end")
    }
    assert steps["start"] == [0, 4]
    assert steps["train"] == list(range(1, NUM_STEPS + 1))
    assert steps["end"] == [NUM_STEPS]
    assert steps["corruption"]
    starts = [row for row in rows if row["kind"] == "start"]
    assert [(row["world_size"], row["samples"]) for row in starts] == [(2, 0), (1, 128)]
    assert (rows[-1]["outcome"], rows[-1]["samples"]) == ("finished", 256)


def test_a_line_has_all_that_one_wants_to_know(place, run_dir):
    lines = (place / "log").read_text().splitlines()
    (line,) = [line for line in lines if "step 3/8  loss" in line]  # of rank 0 alone
    assert " rank 0 INFO: step 3/8" in line
    row = next(row for row in read_rows(run_dir) if (row["step"], row["kind"]) == (3, "train"))
    for part in (
        *(f"loss {row['loss']:.4f}", f"lr {row['lr']:.3g}", f"norm {row['grad_norm']:.3g}"),
        *(f"{row['images_per_second']:.0f} img/s", f"{row['images_per_second_per_device']:.0f} a device"),
        *(f"train top-1 {row['train_top1']:.1f} %", f"{row['memory_bytes'] / 1e9:.1f} GB"),
        *(f"data {row['data_wait']:.0%}", f"bound by {row['bound_by']} ", f" on rank {row['slowest_rank']}", " left"),
    ):
        assert part in line, part
    assert any("1 corrupt" in line for line in lines if "  loss " in line)


def test_a_file_has_no_control_characters(place, run_dir):
    assert not set((place / "log").read_text()) & {chr(code) for code in (*range(9), *range(11, 32), 127)}


def test_a_terminal_has_a_bar_below_the_lines(place, run_dir):
    screen = (place / "screen").read_bytes().decode()
    assert "8/8" in screen
    assert "\r" in screen.replace("\r\n", "\n"), "nothing is drawn over"
    assert sum("step 7/8  loss" in line for line in screen.splitlines()) == 1


def test_each_rank_leaves_its_profile(run_dir):
    for rank in range(2):
        trace = json.loads(gzip.decompress((run_dir / f"profile/trace_rank{rank}.json.gz").read_bytes()))
        names = [event.get("name") for event in trace["traceEvents"]]
        assert names.count("DistributedDataParallel.forward") == 2, "another number of steps"
        assert "DistributedDataParallel.forward" in (run_dir / f"profile/operations_rank{rank}.txt").read_text()
        memory = json.loads((run_dir / f"profile/memory_rank{rank}.json").read_text())
        assert max(num_bytes for _, num_bytes in memory) > 1e6


def test_tensorboard_has_all(run_dir):
    read = EventAccumulator(str(run_dir), size_guidance={"histograms": 0}).Reload()
    rows = [row for row in read_rows(run_dir) if row["kind"] == "train"]
    for name in ("loss", "train_top1", "lr", "grad_norm", "images_per_second", "data_wait"):
        found = [(event.step, event.value) for event in read.Scalars(f"train/{name}")]
        assert found == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows], name
    assert {f"train/stages/{stage}" for stage in STAGES} <= set(read.Tags()["scalars"])
    wanted = {f"{kind}_norms/{part}" for kind in ("parameter", "gradient") for part in PARTS}
    assert set(read.Tags()["histograms"]) == wanted
    (first, last) = read.Histograms("gradient_norms/stem")
    assert (first.step, last.step) == (1, NUM_STEPS)
    assert [image.step for image in read.Images("samples")] == [1, NUM_STEPS]
    assert [event.value for event in read.Scalars("result/best_top1")] == [read_rows(run_dir)[-1]["best_top1"]]
    assert {"config/text_summary", "samples/targets/text_summary"} <= set(read.Tags()["tensors"])


def test_sample_pictures_have_their_targets(run_dir):
    num_own = 0  # an image of which next to nothing is left has its partner's class alone
    for step in (1, NUM_STEPS):
        tiles = json.loads((run_dir / f"samples/step_{step:08d}.json").read_text())
        assert len(tiles) == 16
        assert np.asarray(Image.open(run_dir / f"samples/step_{step:08d}.png")).shape == (128, 128, 3)
        assert all(0.9 <= sum(share for _, share in tile["targets"]) <= 1 for tile in tiles)
        for tile in tiles:
            names, shares = zip(*tile["targets"], strict=True)
            assert set(names) <= {f"class_{label}" for label in range(4)}
            assert len(names) == len(set(names)) <= 2
            assert list(shares) == sorted(shares, reverse=True)
            num_own += tile["label"] in names
    assert num_own > 16


def test_wandb_goes_on_with_one_run(place, run_dir):
    first, second = calls(place, "init")
    assert first["id"] == second["id"] == (run_dir / "wandb_id").read_text().strip()
    assert (first["resume"], second["resume"]) == ("allow", "allow")
    assert first["config"]["schedule"]["cosine"] == "8 steps"
    rows = [row for row in read_rows(run_dir) if row["kind"] == "train"]
    sent = [(row["step"], row["train/loss"]) for row in calls(place, "log") if "train/loss" in row]
    assert [step for step, _ in sent] == [*range(1, NUM_STEPS + 1), *range(5, NUM_STEPS + 1)]
    assert dict(sent) == {row["step"]: row["loss"] for row in rows}
    assert calls(place, "finish") == [{"exit_code": 0}] * 2
    assert calls(place, "summary")[-1] == {"result/best_top1": read_rows(run_dir)[-1]["best_top1"]}


def test_no_secret_is_written(place, run_dir):
    for path in place.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_a_missing_wandb_stops_all_ranks(place):
    done = torchrun(2, *words(place, "--tag", "missing"), timeout=120)
    assert done.returncode != 0
    assert "wandb=true, and it is not installed; hint: pip install wandb, or set wandb=false" in done.stderr
    assert "exitcode  : 2" in done.stderr  # of the first to stop: torchrun ends the other
    assert not (place / "missing").exists()
