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
    table = [line.split() for line in done.stdout.splitlines()]
    assert table[0] == ["split", "samples", "classes", "shards", "bytes", "seconds", "samples/s", "MB/s", "folder"]
    assert [line[:4] for line in table[1:]] == [["train", "360", "3", "8"], ["val", "30", "3", "1"]]
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
    assert done.stdout.count("all valid") == 2


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


def test_datasets_reads_the_same_samples(source, shards):
    datasets = pytest.importorskip("datasets")
    files = {"train": str(shards / "train/*.tar"), "val": str(shards / "val/*.tar")}
    for split, num_samples in (("train", 360), ("val", 30)):
        found = list(datasets.load_dataset("webdataset", data_files=files, split=split, streaming=True))
        assert len(found) == num_samples
        for sample in found[:: num_samples // 10]:
            original = Image.open(source / split / sample["json"]["path"])
            assert np.array_equal(np.asarray(sample["jpg"]), np.asarray(original))
            assert sample["cls"] == sample["json"]["label"]


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


@pytest.fixture(scope="module")
def many(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of the training split in 180 shards, by an undisturbed run."""
    out = tmp_path_factory.mktemp("many") / "out"
    done = data_prep("shard", source / "train", out, "--shard-size", 2, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return hashes(out)


def start(*arguments: object) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "data_prep.shard", *map(str, arguments)]
    devnull = subprocess.DEVNULL
    return subprocess.Popen(line, cwd=ROOT, start_new_session=True, stdout=devnull, stderr=devnull)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_killed_run_leaves_no_process_and_its_repetition_the_same_bytes(source, many, tmp_path):
    arguments = [source / "train", tmp_path / "out", "--shard-size", 2, "--workers", 2]
    process = start(*arguments)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("train-*.tar.json")):  # its tar alone is no complete shard yet
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
    refused = data_prep("index", tmp_path / "out")
    assert refused.returncode == 2
    assert "of 180 shards are not complete" in refused.stderr

    done = data_prep("shard", *arguments)
    assert done.returncode == 0, done.stderr
    assert "of 180 shards are complete already" in done.stdout
    assert hashes(tmp_path / "out") == many


def run_with_kills(commands: list[list[object]], out: Path, random: np.random.RandomState, num_kills: int) -> None:
    """Run commands side by side, killing one after the other at random moments and starting it again at once.

    Command i writes every len(commands)-th of 180 shards from shard i on. The first kill falls by progress, not by
    the clock, so that on a machine of any speed it strikes while shards are written; the others fall anywhere.
    """
    running = [start(*command) for command in commands]
    share = 180 // len(commands)
    deadline = time.monotonic() + 60
    for number in range(num_kills):
        victim = random.randint(len(commands))
        shards = [out / f"train-{shard:06d}.tar.json" for shard in range(victim, 180, len(commands))]
        wanted = random.randint(share // 3) if number == 0 else 0
        while sum(path.exists() for path in shards) < wanted or not list(out.glob(f"train-{victim:06d}.tar*")):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        if number:
            # From its first shard to its last it takes half a second; when it starts again, as long before the first.
            time.sleep(random.uniform(0, 1.2) / len(commands))
        running[victim].kill()  # its workers are still there when the next run begins
        was_killed = running[victim].wait() == -signal.SIGKILL
        if number == 0:
            assert was_killed
            assert not all(path.exists() for path in shards), "the run ended before it was killed"
        running[victim] = start(*commands[victim])
    assert [process.wait(timeout=120) for process in running] == [0] * len(commands)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 25))])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(source, many, tmp_path, seed):
    command = [source / "train", tmp_path / "out", "--shard-size", 2, "--workers", 1 + seed % 2]
    run_with_kills([command], tmp_path / "out", np.random.RandomState(seed), 4)
    assert hashes(tmp_path / "out") == many


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 13))])
def test_parts_that_start_together_and_are_killed_end_with_the_same_bytes(source, many, tmp_path, seed):
    common = [source / "train", tmp_path / "out", "--shard-size", 2, "--workers", 1]
    commands = [[*common, "--part", f"{index}/3"] for index in range(3)]
    run_with_kills(commands, tmp_path / "out", np.random.RandomState(seed), 4)
    line = [sys.executable, "-m", "data_prep.index", str(tmp_path / "out")]
    merges = [subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [merge.wait(timeout=120) for merge in merges] == [0, 0]
    assert hashes(tmp_path / "out") == many


def test_a_full_disk_is_one_line_and_what_is_complete_stays(source, shards, tmp_path):
    """Files may have 30 blocks here, as a quota would have it, and later as many as they want."""
    (tmp_path / "tree/a").mkdir(parents=True)
    sizes = [8, 8, 8, 8, 200, 8, 8, 8]  # one shard is too large
    for i, side in enumerate(sizes):
        pixels = np.random.RandomState(i).randint(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"tree/a/{i}.png")
    arguments = [tmp_path / "tree", tmp_path / "out", "--shard-size", 1, "--workers", 1]
    line = [sys.executable, "-m", "data_prep.shard", *map(str, arguments)]
    limited = ["bash", "-c", 'ulimit -f 30; exec "$@"', "bash", *line]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done
    assert len(done.stderr.splitlines()) == 1
    assert "error: cannot write a shard" in done.stderr
    assert "(File too large); hint: " in done.stderr
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert 0 < len(kept) < len(sizes)
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert data_prep("shard", *arguments).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_bad_input_is_one_line_and_exit_code_2(shards, tmp_path):
    (tmp_path / "tree/a").mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    for i in range(8):
        (tmp_path / f"tree/a/{i}.jpg").write_bytes(buffer.getvalue())
    (tmp_path / "tree/a/9.jpg").write_bytes(b"text")
    shutil.copytree(shards / "val", tmp_path / "corrupt")
    path = tmp_path / "corrupt/val-000000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    cases = [
        (data_prep("shard", tmp_path / "absent", tmp_path / "out"), "source is missing"),
        (
            data_prep("shard", tmp_path / "tree", tmp_path / "out", "--shard-size", 2, "--workers", 2),
            "a/9.jpg",
        ),
        (data_prep("shard", tmp_path / "tree", shards), "out"),
        (data_prep("verify", tmp_path / "corrupt"), "corrupt"),
        (data_prep("verify", tmp_path / "tree"), "no shards here"),
    ]
    for done, words in cases:
        assert done.returncode == 2, done
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("error: ")
        assert words in done.stderr
        assert "hint: " in done.stderr
    assert not (tmp_path / "out/manifest.json").exists()


def test_data_prep_loads_no_torch():
    code = "import sys, data_prep.shard, data_prep.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
