"""verify passes valid shards, and names each sample whose bytes, label or place is wrong."""

import dataclasses
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import index, shard, verify
from data_prep.shards import problems
from data_prep.shards.problems import make_tasks, verify_shard
from data_prep.shards.samples import Task as IndexTask
from data_prep.shards.samples import index_tar
from gcvit.data.manifest import COLUMNS, Manifest, read_manifest, write_manifest
from gcvit.errors import UserError


@pytest.fixture
def out(tree: Path, tmp_path: Path) -> Path:
    shard.main([str(tree), str(tmp_path / "out"), "--shard-size", "5", "--workers", "1"])
    return tmp_path / "out"


def problems_of(out: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    with pytest.raises(UserError, match="corrupt"):
        verify.main([str(out), "--workers", "1"])
    return capsys.readouterr().out.splitlines()[:-1]


def key_of(manifest: Manifest, index: int) -> str:
    return os.path.splitext(manifest.member_name(index).split(": ")[1])[0]


def replace(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def rewrite(manifest: Manifest, **changes: np.ndarray) -> None:
    """Write the manifest anew, in keeping with the shards as they are now."""
    shards = []
    for entry in manifest.shards:
        data = (manifest.root / entry.name).read_bytes()
        shards.append(dataclasses.replace(entry, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    columns = {name: np.array(getattr(manifest, name)) for name in COLUMNS} | changes
    write_manifest(manifest.root, manifest.split, manifest.classes, shards, columns)


def test_sound_shards_pass(out, capsys):
    verify.main([str(out), "--workers", "1"])
    assert "train: 12 samples of 3 classes in 3 shards, all valid" in capsys.readouterr().out


def test_a_flipped_byte_of_an_image_is_found(out, capsys):
    manifest = read_manifest(out)
    place = int(manifest.offset[6] + manifest.length[6] // 2)
    path = out / manifest.shards[1].name
    replace(path, place, bytes([path.read_bytes()[place] ^ 0x10]))
    lines = problems_of(out, capsys)
    key = key_of(manifest, 6)
    assert any(f"{path}: SHA-256" in line for line in lines)
    assert any(f"{path}: {key}: crc32" in line for line in lines)


def test_a_flipped_bit_anywhere_in_a_shard_is_found(out, capsys):
    path = out / "train-000002.tar"
    valid = path.read_bytes()
    for place in np.random.RandomState(0).choice(len(valid), 40, replace=False):
        replace(path, int(place), bytes([valid[place] ^ 1]))
        assert problems_of(out, capsys)
        path.write_bytes(valid)


def test_an_image_that_was_truncated_before_sharding_is_found(tree, tmp_path, capsys):
    path = tree / "c/1.jpg"
    path.write_bytes(path.read_bytes()[:-100])  # the header is whole, so sharding takes it
    shard.main([str(tree), str(tmp_path / "out"), "--workers", "1"])
    [line] = problems_of(tmp_path / "out", capsys)
    assert "c/1: does not decode: image file is truncated" in line


def test_labels_and_places_that_disagree_are_found(out, capsys):
    manifest = read_manifest(out)
    label, offset = np.array(manifest.label), np.array(manifest.offset)
    label[3] = (label[3] + 1) % 3
    offset[8] += 512
    keys = [key_of(manifest, i) for i in (3, 8)]
    rewrite(manifest, label=label, offset=offset)
    lines = problems_of(out, capsys)
    assert len(lines) == 4
    assert f"{keys[0]}: .cls says" in lines[0]
    assert f"{keys[0]}: .json says" in lines[1]
    assert f"sample 8: lost: no image lies at byte {offset[8]}" in lines[2]
    assert f"{keys[1]}: the manifest lacks this sample" in lines[3]


def test_missing_and_surplus_members_are_found(out, capsys):
    manifest = read_manifest(out)
    path = out / "train-000000.tar"
    valid = path.read_bytes()
    replace(path, int(manifest.offset[3]) - 512, bytes(1024))  # two empty blocks end a tar
    rewrite(manifest)
    first, second = problems_of(out, capsys)
    assert "an empty block before the end" in first
    assert "sample 3: lost: no image lies at byte" in second
    path.write_bytes((out / "train-000001.tar").read_bytes())
    rewrite(manifest)
    assert any("crc32" in line for line in problems_of(out, capsys))
    path.write_bytes(valid)
    (out / "stray.tar").write_bytes(valid)
    rewrite(manifest)
    [line] = problems_of(out, capsys)
    assert line == f"{out}/stray.tar: is not in the manifest"


def test_a_shard_that_is_gone_is_found(out, capsys):
    (out / "train-000002.tar").unlink()
    lines = problems_of(out, capsys)
    assert lines[0] == f"{out}/train-000002.tar: cannot be read: No such file or directory"
    assert len(lines) == 1 + 2


def test_problems_are_written_as_json(out, tmp_path, capsys):
    file = tmp_path / "problems.json"
    verify.main([str(out), "--workers", "1", "--json", str(file)])
    assert json.loads(file.read_bytes()) == []
    manifest = read_manifest(out)
    replace(out / "train-000001.tar", int(manifest.offset[6]) + 30, b"\xff\x00\xff")
    with pytest.raises(UserError, match="corrupt"):
        verify.main([str(out), "--workers", "1", "--json", str(file)])
    shard_problem, *problems = json.loads(file.read_bytes())
    assert shard_problem["sample"] is None
    assert shard_problem["problem"].startswith("SHA-256")
    for problem in problems:
        assert problem.keys() == {"split", "shard", "sample", "key", "problem", "repairable"}
        assert (problem["split"], problem["shard"], problem["sample"]) == ("train", "train-000001.tar", 6)
        assert problem["key"] == key_of(manifest, 6)
    assert problems[0]["problem"].startswith("crc32 is")


def test_every_truncation_is_found_to_the_sample(out):
    """A cut loses the samples of which it takes a member, and no others."""
    manifest = read_manifest(out)
    [_, task, _] = make_tasks(manifest)
    path = out / task.shard.name
    valid = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [member.offset_data + -(-member.size // 512) * 512 for member in tar]
    assert verify_shard(task) == []
    for size in range(0, len(valid), 512):
        path.write_bytes(valid[:size])
        problems = verify_shard(task)
        assert problems[0].problem.startswith("is truncated")
        lost = {problem.sample for problem in problems if problem.sample is not None}
        whole = {5 + row for row in range(5) if ends[3 * row + 2] <= size}
        assert lost == set(range(5, 10)) - whole
    path.write_bytes(valid)


def flips_of(manifest: Manifest, shard: int, step: int) -> Iterator[tuple[int, int | None]]:
    """Bytes of a shard, and the sample to which each belongs; None beyond the last."""
    with tarfile.open(manifest.root / manifest.shards[shard].name) as tar:
        ends = [member.offset_data + -(-member.size // 512) * 512 for member in tar][2::3]
    first = int(manifest.first[shard])
    for place in range(0, manifest.shards[shard].num_bytes, step):
        yield place, next((first + row for row, end in enumerate(ends) if place < end), None)


def check_flips(manifest: Manifest, step: int) -> None:
    task = make_tasks(manifest)[1]
    path = manifest.root / task.shard.name
    valid = path.read_bytes()
    for place, sample in flips_of(manifest, 1, step):
        data = bytearray(valid)
        data[place] ^= 1 + place % 255
        path.write_bytes(data)
        problems = verify_shard(task)
        assert problems[0].sample is None
        assert problems[0].problem.startswith("SHA-256")
        corrupt = {problem.sample for problem in problems[1:]} - {None}
        # Padding and a path in a .json say nothing that is needed: there the shard's hash alone tells.
        assert corrupt <= {sample}
        is_image = any(0 <= place - int(task.offset[row]) < int(task.length[row]) for row in range(5))
        is_header = valid[place // 512 * 512 :][257:262] == b"ustar" and place % 512 not in (
            154,
            155,
        )  # a checksum's end
        assert corrupt == {sample} or not (is_image or is_header)
    path.write_bytes(valid)


def test_flipped_bytes_are_found_to_the_sample(out):
    check_flips(read_manifest(out), step=97)


@pytest.mark.slow
def test_every_flipped_byte_is_found_to_the_sample(out):
    check_flips(read_manifest(out), step=1)


@pytest.mark.parametrize("options", [[], ["--checksums"]])
def test_corruption_in_tars_of_others_is_found_to_the_sample(tmp_path, make_image, options):
    """timm's style, where the label comes first: all of a tar's bytes in turn, in steps."""
    images = [make_image(seed) for seed in range(4)]
    with tarfile.open(tmp_path / "x-train-0.tar", "w") as tar:
        for i, image in enumerate(images):
            for name, data in (("cls", b"%d" % (i % 2)), ("jpg", image), ("json", b'{"width": 11}')):
                info = tarfile.TarInfo(f"{i}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    index.main([str(tmp_path), "--workers", "1", *options])
    manifest = read_manifest(tmp_path)
    [task] = make_tasks(manifest)
    path = tmp_path / "x-train-0.tar"
    valid = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [member.offset_data + -(-member.size // 512) * 512 for member in tar][2::3]
    for place, sample in flips_of(manifest, 0, 61):
        data = bytearray(valid)
        data[place] ^= 1 + place % 255
        path.write_bytes(data)
        problems = verify_shard(task)
        corrupt = {problem.sample for problem in problems} - {None}
        assert corrupt <= {sample}
        if options:
            assert problems[0].problem.startswith("SHA-256")
        block, byte = valid[place // 512 * 512 :][:512], place % 512
        is_header = block[257:262] == b"ustar" and byte not in (154, 155)
        is_image = any(0 <= place - int(task.offset[row]) < int(task.length[row]) for row in range(4))
        assert corrupt == {sample} or not (is_header or (is_image and options))
    for size in range(0, len(valid), 512):
        path.write_bytes(valid[:size])
        problems = verify_shard(task)
        assert problems[0].problem.startswith("is truncated")
        corrupt = {problem.sample for problem in problems} - {None}
        whole = {row for row in range(4) if ends[row] <= size}
        assert corrupt == set(range(4)) - whole
    path.write_bytes(valid)
    assert verify_shard(task) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_corruption_makes_verify_or_index_crash(out, data):
    """Blocks overwritten, moved and cut out: problems and refusals, never a traceback."""
    task = make_tasks(read_manifest(out))[0]
    path = out / task.shard.name
    valid = path.read_bytes()
    content = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, max(0, len(content) // 512 - 1))) * 512
        end = begin + data.draw(st.integers(1, 8)) * 512
        what = data.draw(st.sampled_from(["zero", "noise", "cut", "copy", "header"]))
        noise = data.draw(st.binary(min_size=1, max_size=64))
        if what == "zero":
            content[begin:end] = bytes(end - begin)
        elif what == "noise":
            content[begin : begin + len(noise)] = noise
        elif what == "cut":
            del content[begin:end]
        elif what == "copy":
            content[begin:begin] = content[end : end + 1024]
        else:  # a valid header of anything
            info = tarfile.TarInfo("x" * len(noise))
            info.type, info.size = noise[:1], 1 << (noise[0] % 40)
            content[begin : begin + 512] = info.tobuf(tarfile.GNU_FORMAT)[:512]
    path.write_bytes(content)
    try:
        problems = verify_shard(task)
        assert problems or content == valid
        result = index_tar(IndexTask(path, {}, True))
        assert result.refused or result.shard.num_samples == len(result.columns["label"])
    finally:
        path.write_bytes(valid)


def test_a_manifest_out_of_order_is_found(out, capsys):
    manifest = read_manifest(out)
    swapped = np.arange(12)
    swapped[[0, 1]] = 1, 0
    rewrite(manifest, **{name: np.array(getattr(manifest, name))[swapped] for name in COLUMNS})
    [line] = problems_of(out, capsys)
    assert line == f"{out}/train-000000.tar: the manifest lists its samples out of order"
    verify.main([str(out), "--workers", "1", "--repair"])
    verify.main([str(out), "--workers", "1"])


def test_no_memory_is_no_corruption(out, monkeypatch):
    def fail(data: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(problems, "decode", fail)
    with pytest.raises(MemoryError):
        verify_shard(make_tasks(read_manifest(out))[0])


def test_folders_without_shards_are_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="no shards here"):
            verify.main([str(folder)])
    (tmp_path / "val").mkdir()
    (tmp_path / "val/val-000000.tar").write_bytes(b"x")
    with pytest.raises(UserError, match="without a manifest"):
        verify.main([str(tmp_path)])
