"""Our tars in other people's readers, and other people's tars in ours. With the real libraries, and no network."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gcvit.data.source import open_source

ROOT = Path(__file__).parents[2]
CLASSES = ("ant", "bee", "cat")


def data_prep(command: str, *arguments: object) -> str:
    line = [sys.executable, "-m", f"data_prep.{command}", *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def encode(seed: int) -> bytes:
    pixels = np.random.RandomState(seed).randint(0, 256, (12, 10, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    for seed in range(40):
        split, name = ("val" if seed % 5 == 0 else "train"), CLASSES[seed % 3]
        (root / split / name).mkdir(parents=True, exist_ok=True)
        (root / split / name / f"{seed}.jpg").write_bytes(encode(seed))
    return root


@pytest.fixture(scope="module")
def shards(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    data_prep("shard", source, out, "--shard-size", 10, "--workers", 1)
    return out


def read_split(folder: Path, split: str) -> list[tuple[bytes, int]]:
    """(image, label) as our own reader finds them, in its order."""
    samples = open_source(folder, split)
    images = samples.fetch(0, samples.num_samples)
    for i, image in enumerate(images):
        samples.check(i, image)
    return [(bytes(image), int(label)) for image, label in zip(images, samples.label, strict=True)]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_hugging_face_datasets_loads_our_shards(shards, tmp_path):
    pytest.importorskip("datasets")
    # In a process of its own: the library reads these variables on import.
    code = """
import json, sys
from datasets import load_dataset
out = []
for split in ("train", "val"):
    files = {split: f"{sys.argv[1]}/{split}/{split}-*.tar"}
    for streaming in (False, True):
        rows = load_dataset("webdataset", data_files=files, split=split, streaming=streaming)
        out.append([(row["__key__"], row["cls"], row["json"]["class"], list(row["jpg"].size)) for row in rows])
print(json.dumps(out))
"""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"), "1")
    environment = os.environ | offline | {"HF_HOME": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    line = [sys.executable, "-c", code, str(shards)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for split, rows in zip(("train", "train", "val", "val"), found, strict=True):
        samples = open_source(shards, split)
        expected = []
        for i in range(samples.num_samples):
            key = samples.name(i).partition(": ")[2].removesuffix(".jpg")
            expected.append([key, int(samples.label[i]), CLASSES[int(samples.label[i])], [10, 12]])
        assert rows == expected


def test_timm_reads_our_shards(shards):
    timm_data = pytest.importorskip("timm.data")
    pytest.importorskip("webdataset")
    for name, split in (("train", "train"), ("val", "val"), ("validation", "val")):
        expected = read_split(shards, split)
        dataset = timm_data.create_dataset("wds/ours", root=str(shards), split=name, is_training=False)
        assert len(dataset) == len(expected)
        found = [(np.asarray(image), target) for image, target in dataset]
        assert [target for _, target in found] == [label for _, label in expected]
        for (image, _), (data, _) in zip(found, expected, strict=True):
            np.testing.assert_array_equal(image, pixels(data))
    dataset = timm_data.create_dataset("wds/ours", root=str(shards), split="train", is_training=True, batch_size=4)
    targets = [target for _, target in dataset]
    assert len(targets) == 32  # shuffled, and whole batches only
    assert set(targets) == {0, 1, 2}


def test_tar_and_webdataset_read_repaired_shards(shards, tmp_path):
    """A repair leaves tars that others read too."""
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / "val/val-000000.tar"
    path.parent.mkdir()
    for file in (shards / "val").iterdir():
        (tmp_path / "val" / file.name).write_bytes(file.read_bytes())
    content = bytearray(path.read_bytes())
    content[100] ^= 1  # the header of the first image
    path.write_bytes(content)
    assert "1 left out, 7 remain" in data_prep("verify", tmp_path, "--repair", "--workers", 1)
    listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
    assert (len(listed.stdout.splitlines()), listed.stderr) == (21, "")
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    expected = read_split(shards, "val")[1:]
    assert [(sample["jpg"], int(sample["cls"])) for sample in samples] == expected
    assert read_split(tmp_path, "val") == expected


def timm_style(label: int, seed: int) -> dict[str, object]:
    return {"jpg": encode(seed), "cls": label, "json": {"filename": f"{seed}.JPEG", "width": 10, "height": 12}}


def open_clip_style(label: int, seed: int) -> dict[str, object]:
    return {"jpg": encode(seed), "txt": f"a photo of a {CLASSES[label]}", "json": {"label": label, "url": "x"}}


def open_clip_names(label: int, seed: int) -> dict[str, object]:
    return {"png": Image.open(io.BytesIO(encode(seed))), "json": {"class": CLASSES[label]}}


@pytest.mark.parametrize("style", [timm_style, open_clip_style, open_clip_names])
@pytest.mark.parametrize("checksums", [False, True])
def test_tars_of_webdataset_writers_are_indexed_and_read(tmp_path, style, checksums):
    webdataset = pytest.importorskip("webdataset")
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{name} and more words\n" for name in CLASSES))
    written: dict[str, list[tuple[np.ndarray, int]]] = {"train": [], "val": []}

    def samples(split: str, seeds: range) -> Iterator[dict[str, object]]:
        for seed in seeds:
            label = seed % 3
            sample = style(label, seed)
            image = sample.get("jpg") or sample["png"]
            written[split].append((pixels(image) if isinstance(image, bytes) else np.asarray(image), label))
            yield {"__key__": f"n{seed:08d}"} | sample

    with webdataset.ShardWriter(str(tmp_path / "imagenet-train-%04d.tar"), maxcount=7, verbose=0) as writer:
        for sample in samples("train", range(20)):
            writer.write(sample)
    with webdataset.TarWriter(str(tmp_path / "imagenet-validation-00.tar")) as writer:
        for sample in samples("val", range(20, 26)):
            writer.write(sample)

    said = data_prep("index", tmp_path, "--workers", 2, "--classes", names, *(["--checksums"] if checksums else []))
    assert "train: 20 samples in 3 tars" in said
    assert "val: 6 samples in 1 tars" in said
    for split, expected in written.items():
        assert open_source(tmp_path, split).classes == CLASSES
        for (data, label), (image, expected_label) in zip(read_split(tmp_path, split), expected, strict=True):
            np.testing.assert_array_equal(pixels(data), image)
            assert label == expected_label
    assert data_prep("verify", tmp_path, "--workers", 1).count("all valid") == 2


def test_tars_of_tar_itself_are_indexed_and_read(tmp_path):
    """`tar cf` writes GNU's format, with folders and long names, and `tar --format=pax` writes pax headers."""
    tree = tmp_path / "tree"
    folder = tree / ("long" * 30) / "ünï"
    folder.mkdir(parents=True)
    for seed in range(4):
        (folder / f"{seed}.JPEG").write_bytes(encode(seed))
        (folder / f"{seed}.cls").write_text(f"{seed % 3}\n")
    for tar_format in ("gnu", "pax", "posix"):
        out = tmp_path / tar_format
        out.mkdir()
        line = ["tar", f"--format={tar_format}", "--sort=name", "-cf", str(out / "a.tar"), "-C", str(tree), "."]
        subprocess.run(line, check=True)
        data_prep("index", out, "--split", "val", "--workers", 1)
        assert read_split(out, "val") == [(encode(seed), seed % 3) for seed in range(4)]


@pytest.mark.parametrize("command", ["index", "verify"])
def test_corruption_is_one_line_on_stderr_and_exit_code_2(tmp_path, shards, command):
    for file in (shards / "val").iterdir():
        if command == "verify" or file.suffix == ".tar":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "val-000000.tar"
    path.write_bytes(path.read_bytes()[:5000])
    line = [sys.executable, "-m", f"data_prep.{command}", str(tmp_path), "--workers", "1"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert "truncated" in done.stdout


def test_index_loads_no_torch():
    code = "import sys, data_prep.index, data_prep.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
