"""Sidecars are merged to the same bytes however often and by however many; what is not complete is named."""

import hashlib
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from data_prep.shards import sidecar
from data_prep.shards.sidecar import (
    MARK,
    Mark,
    Sidecar,
    has_sidecars,
    merge,
    read_mark,
    read_sidecar,
    sidecar_path,
    write_mark,
    write_sidecar,
)
from gcvit.data.manifest import COLUMNS, FILE_NAME, Shard, read_manifest, write_manifest
from gcvit.errors import UserError

MARK_OF_THREE = Mark("plan", "train", ("cat", "猫"), 3)


def write_shard(folder: Path, number: int, plan: str = "plan") -> Sidecar:
    name = MARK_OF_THREE.shard_name(number)
    data = bytes([number]) * 100
    (folder / name).write_bytes(data)
    num_samples = number + 1
    columns = {key: np.arange(num_samples).astype(dtype) for key, dtype in COLUMNS.items()}
    columns["crc32"] += np.uint32(2**32 - 9)
    shard = Shard(name, num_samples, len(data), hashlib.sha256(data).hexdigest())
    written = Sidecar(shard, columns, 77)
    write_sidecar(folder / name, plan, written)
    return written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_mark(tmp_path, MARK_OF_THREE)
    for number in range(3):
        write_shard(tmp_path, number)
    return tmp_path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_was_written_is_read(tmp_path):
    write_mark(tmp_path, MARK_OF_THREE)
    assert read_mark(tmp_path) == MARK_OF_THREE
    written = write_shard(tmp_path, 1)
    found = read_sidecar(tmp_path / written.shard.name, "plan")
    assert (found.shard, found.num_source_bytes) == (written.shard, 77)
    for name, column in written.columns.items():
        assert found.columns[name].dtype == COLUMNS[name]
        np.testing.assert_array_equal(found.columns[name], column)


def corruption_size(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def corruption_text(path: Path) -> None:
    sidecar_path(path).write_text(sidecar_path(path).read_text()[:-9])


def corruption_column(path: Path) -> None:
    content = json.loads(sidecar_path(path).read_bytes())
    content["columns"]["label"].pop()
    sidecar_path(path).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "corruption",
    [
        corruption_size,
        corruption_text,
        corruption_column,
        Path.unlink,
        lambda path: sidecar_path(path).unlink(),
        lambda path: sidecar_path(path).write_text("[]"),
        lambda path: sidecar_path(path).write_text(""),
        lambda path: write_shard(path.parent, 1, "another plan"),
    ],
)
def test_a_shard_that_is_not_complete_is_named(folder, corruption):
    path = folder / "train-000001.tar"
    corruption(path)
    assert read_sidecar(path, "plan") is None
    before = snapshot(folder)
    with pytest.raises(UserError, match=r"1 of 3 shards are not complete: .*got train-000001\.tar; hint: start"):
        merge(folder)
    assert snapshot(folder) == before


def test_merging_leaves_the_manifest_that_one_run_writes(folder, tmp_path_factory):
    sidecars = [read_sidecar(folder / MARK_OF_THREE.shard_name(i), "plan") for i in range(3)]
    expected = tmp_path_factory.mktemp("expected")
    columns = {name: np.concatenate([one.columns[name] for one in sidecars]) for name in COLUMNS}
    write_manifest(expected, "train", MARK_OF_THREE.classes, [one.shard for one in sidecars], columns)
    (folder / "train-000000.tar.0123abcd.tmp").write_bytes(b"a killed run's")
    (folder / ".merging-0123abcd").mkdir()
    assert has_sidecars(folder)
    merged = merge(folder)
    assert not has_sidecars(folder)
    assert merged.digest == read_manifest(folder).digest
    tars = {MARK_OF_THREE.shard_name(i) for i in range(3)}
    after = snapshot(folder)
    assert {name: data for name, data in after.items() if name not in tars} == snapshot(expected)
    assert tars < set(after)
    merge(folder)
    assert snapshot(folder) == after


def test_a_merge_killed_at_any_file_operation_is_finished_by_the_next(folder, tmp_path_factory, monkeypatch):
    """Every replace and every unlink is in turn the last thing that a merge does."""

    class Killed(BaseException):
        pass

    start = snapshot(folder)
    merge(folder)
    expected = snapshot(folder)
    for last in range(100):
        copy = tmp_path_factory.mktemp("copy")
        for name, data in start.items():
            (copy / name).write_bytes(data)
        num_left = last

        def count(operation):
            def run(*arguments, **options):
                nonlocal num_left
                if num_left == 0:
                    raise Killed
                num_left -= 1
                return operation(*arguments, **options)

            return run

        with monkeypatch.context() as patch:
            patch.setattr(sidecar.os, "replace", count(os.replace))
            patch.setattr(Path, "unlink", count(Path.unlink))
            patch.setattr(sidecar.shutil, "rmtree", lambda *_, **__: None)
            try:
                merge(copy)
                killed = False
            except Killed:
                killed = True
        assert killed == has_sidecars(copy)
        merge(copy)
        assert snapshot(copy) == expected
        if not killed:
            break
    assert last > 8


def test_two_merges_at_once(folder):
    expected_names = {FILE_NAME, *(f"manifest.{name}.npy" for name in COLUMNS)}
    errors, digests = [], []
    barrier = threading.Barrier(4)

    def run():
        barrier.wait()
        try:
            digests.append(merge(folder).digest)
        except Exception as error:
            errors.append(error)

    for _ in range(10):
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert {name for name in snapshot(folder) if not name.endswith(".tar")} == expected_names
        for path in folder.iterdir():
            path.unlink()
        write_mark(folder, MARK_OF_THREE)
        for number in range(3):
            write_shard(folder, number)
    assert len(set(digests)) == 1
    assert len(digests) == 40


@pytest.mark.parametrize("text", [None, "", "[]", '{"plan": "x"}'])
def test_a_folder_without_a_mark_cannot_be_merged(folder, text):
    (folder / MARK).unlink()
    if text is not None:
        (folder / MARK).write_text(text)
    with pytest.raises(UserError, match="no interrupted sharding here"):
        merge(folder)


def test_a_full_disk_is_one_error(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sidecar, "write_manifest", full)
    before = snapshot(folder)
    with pytest.raises(UserError, match=r"cannot write the manifest: .*No space left.*hint"):
        merge(folder)
    assert snapshot(folder) == before
