"""Where the data lies and what is wrong with it, as train.py and evaluate.py meet it: corrupt shards, a web server."""

import functools
import json
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gcvit.data.source import open_source
from tests.helpers.launching import python, succeed, torchrun

pytestmark = pytest.mark.dist

CONFIG = Path(__file__).parents[1] / "helpers/golden.yaml"
NUM_TRAIN, NUM_VAL = 96, 31


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """train/ and val/ in shards of 20; four classes of noisy colours."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, num_images in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        for i in range(num_images):
            folder = root / "raw" / split / f"class_{i % 4}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (36, 36, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    succeed(python("-m", "data_prep.shard", root / "raw", root / "shards", "--shard-size", 20, "--workers", 1))
    return root / "shards"


def train(num_processes: int, data: object, runs: Path, tag: str, *others: str):
    flags = ["train.py", "--config", CONFIG, "--data_dir", data, "--tag", tag, f"output_dir={runs}"]
    options = ["schedule.cosine=6 steps", "trainer.log_every=2 steps", "trainer.eval_every=6 steps", *others]
    return torchrun(num_processes, *flags, *options) if num_processes > 1 else python(*flags, *options)


def rows(run_dir: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def flip(root: Path, split: str, samples: list[int]) -> list[str]:
    """Flip a byte of these samples' images; returns where they lie."""
    source = open_source(root, split)
    for sample in samples:
        shard = source._manifest.shards[int(np.searchsorted(source.first, sample, side="right")) - 1]
        with open(root / split / shard.name, "r+b") as file:
            file.seek(int(source._manifest.offset[sample]) + 60)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 0x10]))
    return [source.name(sample) for sample in samples]


@pytest.fixture
def corrupt(shards, tmp_path) -> tuple[Path, list[str]]:
    root = shutil.copytree(shards, tmp_path / "copy")
    return root, flip(root, "train", [3, 50, 95])


def test_corruption_within_the_budget_is_replaced_counted_and_named(corrupt, tmp_path):
    root, names = corrupt
    flip(root, "val", [7])
    # 6 steps of 32 are two epochs: each corrupt sample is met twice, by either rank.
    done = succeed(train(2, root, tmp_path, "some", "data.max_corrupt_fraction=0.04", "data.num_workers=1"))
    told = rows(tmp_path / "some", "corruption")
    assert sorted(row["where"] for row in told) == sorted(names)
    assert {row["reason"] for row in told} == {"another checksum"}
    assert told[-1]["num_corrupt"] == 3
    assert all(done.stderr.count(f"CORRUPT, replaced: {name}") == 1 for name in names)
    assert rows(tmp_path / "some", "train")[-1]["step"] == 6
    (evaluated,) = rows(tmp_path / "some", "val/weights")
    assert (evaluated["num_samples"], evaluated["num_skipped"]) == (NUM_VAL - 1, 1)
    assert "without 1 CORRUPT samples" in done.stderr


def test_corruption_beyond_the_budget_stops_all_ranks_with_the_list(corrupt, tmp_path):
    root, names = corrupt
    done = train(2, root, tmp_path, "many", "data.max_corrupt_fraction=0.02")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr.split("torch.distributed.run")[0] or "UserError" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "too many samples are corrupt: got 3 of 96: " in line or "got 2 of 96" in line
    assert any(name in line for name in names)
    assert "expected: 1 (data.max_corrupt_fraction=0.02)" in line


def test_evaluation_refuses_corruption_or_counts_it(shards, tmp_path):
    succeed(train(1, shards, tmp_path, "run"))
    root = shutil.copytree(shards, tmp_path / "copy")
    names = flip(root, "val", [7, 30])
    whole = json.loads(succeed(python("evaluate.py", tmp_path / "run", "--data_dir", shards)).stdout.splitlines()[-1])
    assert (whole["num_samples"], whole["num_skipped"]) == (NUM_VAL, 0)
    done = python("evaluate.py", tmp_path / "run", "--data_dir", root)
    assert done.returncode == 2
    assert names[0] in done.stderr
    assert "--skip-corrupt" in done.stderr
    done = succeed(torchrun(2, "evaluate.py", tmp_path / "run", "--data_dir", root, "--skip-corrupt"))
    some = json.loads(done.stdout.splitlines()[-1])
    assert (some["num_samples"], some["num_skipped"]) == (NUM_VAL - 2, 2)
    assert 0 <= whole["correct_top1"] - some["correct_top1"] <= 2
    assert all(f"skipped: {name}" in done.stderr for name in names)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        pass


@pytest.mark.slow
def test_a_run_from_a_web_server_is_the_run_from_the_disk(shards, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=shards))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    cache = tmp_path / "cache"
    try:
        five = ("data.num_workers=1", "schedule.cosine=5 steps")  # of 32: in the middle of an epoch
        succeed(train(2, shards, tmp_path, "disk", *five))
        succeed(train(2, url, tmp_path, "web", *five, f"data.cache_dir={cache}"))
        result = succeed(python("evaluate.py", tmp_path / "disk", "--data_dir", url, "--cache_dir", cache))
    finally:
        server.shutdown()
        server.server_close()
    # Another order would repeat some samples of the epoch and skip others.
    done = train(1, shards, tmp_path, "disk", "schedule.cosine=9 steps", "data.chunk_bytes=9999")
    assert done.returncode == 2
    assert "got data.lanes=4, data.chunk_bytes=9999, data.shuffle_chunks=2; expected: data.lanes=4" in done.stderr
    losses = [[row["loss"] for row in rows(tmp_path / tag, "train")] for tag in ("disk", "web")]
    assert losses[0] == losses[1]
    assert json.loads(result.stdout.splitlines()[-1])["num_samples"] == NUM_VAL
    assert len(list(cache.rglob("*.tar"))) == 5 + 2
