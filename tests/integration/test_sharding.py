"""data_prep as a user runs it: processes, exit codes, kills, and other people's readers of tars."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def data_prep(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", f"data_prep.{command}", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with three classes of 120 and 10 images, with names that a key must encode."""
    root = tmp_path_factory.mktemp("source")
    random = np.random.RandomState(0)
    for split, num_images in (("train", 120), ("val", 10)):
        for name in ("cat", "v1.5 hund", "猫"):
            (root / split / name).mkdir(parents=True)
            for i in range(num_images):
                pixels = random.randint(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.x.jpg")
    return root


@pytest.fixture(scope="module")
def shards(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    done = data_prep("shard", source, out, "--shard-size", 50, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress line where stderr is no terminal
    assert "train: 360 samples of 3 classes in 8 shards" in done.stdout
    return out


def test_the_number_of_workers_leaves_no_trace(source, shards, tmp_path):
    # A copy of the tree in another place, with other times, in another order of creation.
    shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copyfile)
    done = data_prep("shard", tmp_path / "copy", tmp_path / "out", "--shard-size", 50, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "out") == hashes(shards)


def test_verify_passes_in_two_processes(shards):
    done = data_prep("verify", shards, "--workers", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("all sound") == 2


def test_tar_lists_the_members(shards):
    done = subprocess.run(["tar", "tf", shards / "val/val-000000.tar"], capture_output=True, text=True, check=True)
    names = done.stdout.splitlines()
    assert done.stderr == ""
    assert len(names) == 90
    assert "%E7%8C%AB/3%2Ex.jpg" in names
    assert "v1%2E5 hund/3%2Ex.cls" in names


def test_webdataset_reads_the_same_samples(source, shards):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted((shards / "train").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert len(samples) == 360
    classes = sorted(["cat", "v1.5 hund", "猫"])
    for sample in samples:
        about = json.loads(sample["json"])
        assert sample["__key__"] == about["key"]
        assert sample["jpg"] == (source / "train" / about["path"]).read_bytes()
        assert int(sample["cls"]) == about["label"] == classes.index(about["class"])
    decoded = next(iter(webdataset.WebDataset(urls[:1], shardshuffle=False, empty_check=False).decode("pil")))
    assert (decoded["jpg"].size, type(decoded["cls"])) == ((8, 8), int)


def live_processes(group: int) -> list[int]:
    """Processes of a group that still run; zombies, which wait for somebody to collect them, do not."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(process_group) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_killed_run_leaves_no_process_and_its_repetition_the_same_bytes(source, tmp_path):
    arguments = [source / "train", tmp_path / "out", "--shard-size", 2, "--workers", 2]
    line = [sys.executable, "-m", "data_prep.shard", *map(str, arguments)]
    process = subprocess.Popen(line, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("train-*.tar")):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/manifest.json").exists(), "the run ended before it was killed"
    while live_processes(process.pid):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    refused = data_prep("verify", tmp_path / "out")
    assert refused.returncode == 2
    assert "shards without a manifest" in refused.stderr

    assert data_prep("shard", *arguments).returncode == 0
    arguments[1] = tmp_path / "undisturbed"
    assert data_prep("shard", *arguments).returncode == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "undisturbed")


def test_bad_input_is_one_line_and_exit_code_2(shards, tmp_path):
    (tmp_path / "tree/a").mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    for i in range(8):
        (tmp_path / f"tree/a/{i}.jpg").write_bytes(buffer.getvalue())
    (tmp_path / "tree/a/9.jpg").write_bytes(b"text")
    shutil.copytree(shards / "val", tmp_path / "damaged")
    path = tmp_path / "damaged/val-000000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    cases = [
        (data_prep("shard", tmp_path / "absent", tmp_path / "out"), "absent (missing)"),
        (
            data_prep("shard", tmp_path / "tree", tmp_path / "out", "--shard-size", 2, "--workers", 2),
            "a/9.jpg",
        ),
        (data_prep("shard", tmp_path / "tree", shards), "out"),
        (data_prep("verify", tmp_path / "damaged"), "damaged"),
        (data_prep("verify", tmp_path / "tree"), "no shards here"),
    ]
    for done, words in cases:
        assert done.returncode == 2, done
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("error: ")
        assert words in done.stderr
        assert "cure: " in done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_data_prep_loads_no_torch():
    code = "import sys, data_prep.shard, data_prep.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
