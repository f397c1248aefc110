"""Rows of parquet files are samples as files in class folders are: the same names, labels and bytes."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data_prep import shard
from data_prep.shards.byte_range import read_place
from data_prep.sources import parquet as parquet_source
from data_prep.sources.discover import Source, find_sources, spooled
from gcvit.errors import UserError

ROOT = Path(__file__).parents[4]
Row = tuple[bytes | None, str | None, int | None]


def write(path: Path, rows: list[Row], names: list[str] | None = None, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.array([{"bytes": data, "path": name} for data, name, _ in rows], pa.struct(IMAGE))
    table = pa.table({"image": image, "label": pa.array([label for _, _, label in rows], pa.int64())})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    parquet.write_table(table, path, **options)


IMAGE = [("bytes", pa.binary()), ("path", pa.string())]


def contents(source: Source, folder: Path, chosen: np.ndarray | None = None) -> dict[str, tuple[int, bytes]]:
    chosen = np.arange(len(source.paths)) if chosen is None else chosen
    folder.mkdir(exist_ok=True)
    with spooled(source, chosen, folder) as readable:
        assert (readable.paths, readable.labels, readable.classes) == (source.paths, source.labels, source.classes)
        assert len(list(folder.iterdir())) == 1
        found = {source.paths[i]: (source.labels[i], read_place(readable.root, readable.place(i))) for i in chosen}
    assert list(folder.iterdir()) == []
    return found


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_and_class_folders_are_the_same_samples(tree, tmp_path):
    [expected] = find_sources(tree, None)
    rows: list[Row] = [
        ((tree / path).read_bytes(), path.split("/")[1], label)
        for path, label in zip(expected.paths, expected.labels, strict=True)
    ]
    order = np.random.RandomState(0).permutation(len(rows))
    rows = [rows[i] for i in order]
    for number, begin in enumerate((0, 5)):
        path = tmp_path / f"hub/data/train-{number:05d}-of-00002.parquet"
        write(path, rows[begin : begin + 5 + 9 * number], ["a", "b", "c"], row_group_size=3)
    [source] = find_sources(tmp_path / "hub", None)
    assert (source.split, source.classes, source.split_folder) == ("train", ("a", "b", "c"), True)
    assert (source.paths, source.labels) == (expected.paths, expected.labels)
    files = {path: (label, (tree / path).read_bytes()) for path, label in zip(source.paths, source.labels, strict=True)}
    assert contents(source, tmp_path / "spool") == files
    some = np.array([7, 0, 3])
    assert contents(source, tmp_path / "spool", some) == {source.paths[i]: files[source.paths[i]] for i in some}
    for divided, other in zip(
        *(find_sources(x, None, val_fraction=0.4) for x in (tmp_path / "hub", tree)), strict=True
    ):
        assert (divided.paths, divided.labels) == (other.paths, other.labels)
        assert contents(divided, tmp_path / "spool") == {path: files[path] for path in other.paths}
    shutil.copytree(tree, tmp_path / "folders/train")
    for root, out in ((tmp_path / "hub", tmp_path / "a"), (tmp_path / "folders", tmp_path / "b")):
        shard.main([str(root), str(out), "--shard-size", "5", "--workers", "1"])
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert "train/train-000002.tar" in snapshot(tmp_path / "a")


def test_splits_follow_the_names_of_files(tmp_path):
    write(tmp_path / "train-00000-of-00001.parquet", [(b"1", "1.jpg", 1)])
    write(tmp_path / "validation-00000-of-00001.parquet", [(b"2", "2.jpg", 11)])
    write(tmp_path / "test-00000-of-00001.parquet", [(b"3", "3.jpg", -1)])
    train, val = find_sources(tmp_path, None)
    assert (train.split, train.paths, train.labels) == ("train", ["01/1.jpg"], [1])
    assert (val.split, val.paths, val.labels) == ("val", ["11/2.jpg"], [11])
    assert train.classes == val.classes == tuple(f"{label:02d}" for label in range(12))
    with pytest.raises(UserError, match="--split has no effect"):
        find_sources(tmp_path, "val")
    with pytest.raises(UserError, match="there is a val already"):
        find_sources(tmp_path, None, val_fraction=0.5)
    (tmp_path / "train-00000-of-00001.parquet").unlink()
    assert [source.split for source in find_sources(tmp_path, None)] == ["val"]
    write(tmp_path / "0000.parquet", [(b"1", "1.jpg", 1)])
    with pytest.raises(UserError, match=r"of no known split: got .*/0000\.parquet"):
        find_sources(tmp_path, None)
    (tmp_path / "validation-00000-of-00001.parquet").rename(tmp_path / "0001.parquet")
    [source] = find_sources(tmp_path, "val")
    assert (source.split, source.split_folder, source.paths) == ("val", False, ["01/1.jpg", "11/2.jpg"])
    (tmp_path / "0001.parquet").unlink()
    (tmp_path / "0000.parquet").unlink()
    with pytest.raises(UserError, match="a test set has no labels"):
        find_sources(tmp_path, None)


def test_a_parquet_file_beside_class_folders_is_not_the_source(tree):
    write(tree / "metadata.parquet", [(b"1", "1.jpg", 0)])
    assert find_sources(tree, None)[0].classes == ("a", "b", "c")


def test_classes_are_called_as_metadata_or_the_class_map_say(tmp_path):
    rows: list[Row] = [(b"1", "1.jpg", 0), (b"2", "2.jpg", 2)]
    write(tmp_path / "a/train.parquet", rows)
    (tmp_path / "map.txt").write_text("n3 third\nn2\nn1\nn0 unseen\n")
    [source] = find_sources(tmp_path / "a", None, classes=tmp_path / "map.txt")
    assert source.classes == ("n3", "n2", "n1", "n0")
    assert list(zip(source.paths, source.labels, strict=True)) == [("n1/2.jpg", 2), ("n3/1.jpg", 0)]
    # Names in the file are facts about the labels, which the map may only put into another order.
    write(tmp_path / "b/train.parquet", rows, ["n1", "n2", "../x/"])
    [source] = find_sources(tmp_path / "b", None)
    assert source.classes == ("n1", "n2", "_._x_")
    assert source.paths == ["_._x_/2.jpg", "n1/1.jpg"]
    with pytest.raises(UserError, match="train has 1 classes that the class map lacks"):
        find_sources(tmp_path / "b", None, classes=tmp_path / "map.txt")
    (tmp_path / "map.txt").write_text("_._x_\nn1\n")
    [source] = find_sources(tmp_path / "b", None, classes=tmp_path / "map.txt")
    assert list(zip(source.paths, source.labels, strict=True)) == [("_._x_/2.jpg", 0), ("n1/1.jpg", 1)]
    with pytest.raises(UserError, match=r"a label has no name: got .*label 2; expected: the 2 classes"):
        find_sources(tmp_path / "a", None, classes=tmp_path / "map.txt")


@pytest.mark.parametrize("path", ["x/../../7.png", "7.jpg", ".jpg", "", None, "..", "C:\\7.gif"])
def test_images_without_a_name_of_their_own_are_numbered(tmp_path, path):
    write(tmp_path / "train.parquet", [(b"1", "7.jpg", 0), (b"2", path, 0), (b"3", "/etc/passwd", 1)])
    [source] = find_sources(tmp_path, None)
    assert source.paths == ["0/0", "0/1", "1/passwd"]
    assert contents(source, tmp_path / "spool")["0/1"] == (0, b"2")


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        ([], None, "no rows"),
        ([(b"1", "1.jpg", None)], None, r"a row has no label: got .*train\.parquet: row 0 with -1"),
        ([(b"1", "1.jpg", 0), (b"1", "1.jpg", -7)], None, r"row 1 with -7"),
        ([(b"1", "1.jpg", 10**9)], None, "row 0 with 1000000000"),
        ([(b"1", "1.jpg", 2)], ["a", "b"], "a label has no name: got .*label 2"),
        ([(b"1", "1.jpg", 0)], ["a", "a"], "no names of their own"),
        ([(b"1", "1.jpg", 0)], ["a", ""], "no names of their own"),
    ],
)
def test_rows_without_sense_are_refused(tmp_path, rows, names, message):
    write(tmp_path / "train.parquet", rows, names)
    with pytest.raises(UserError, match=message):
        find_sources(tmp_path, None)


@pytest.mark.parametrize(
    "columns",
    [
        {"img": pa.array([b"1"]), "label": pa.array([0])},
        {"image": pa.array([b"1"]), "label": pa.array([0])},
        {"image": pa.array([{"bytes": "1"}]), "label": pa.array([0])},
        {"image": pa.array([{"bytes": b"1"}]), "label": pa.array(["cat"])},
        {"image": pa.array([{"bytes": b"1"}])},
    ],
)
def test_other_columns_are_refused(tmp_path, columns):
    parquet.write_table(pa.table(columns), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"has other columns: got .*train\.parquet with .*expected: image: struct"):
        find_sources(tmp_path, None)


def test_files_that_disagree_or_are_corrupt_are_refused(tmp_path):
    write(tmp_path / "train-0.parquet", [(b"1" * 5000, "1.jpg", 0)], ["a", "b"])
    write(tmp_path / "train-1.parquet", [(b"2", "2.jpg", 1)], ["b", "a"])
    with pytest.raises(UserError, match=r"disagree on the names of the classes: got .*train-0\.parquet and .*train-1"):
        find_sources(tmp_path, None)
    (tmp_path / "train-1.parquet").rename(tmp_path / "val-1.parquet")
    with pytest.raises(UserError, match="disagree on the names"):
        find_sources(tmp_path, None)
    (tmp_path / "val-1.parquet").unlink()
    [source] = find_sources(tmp_path, None)
    data = (tmp_path / "train-0.parquet").read_bytes()
    (tmp_path / "train-0.parquet").write_bytes(data[:-100])
    for fails in (lambda: find_sources(tmp_path, None), lambda: contents(source, tmp_path / "spool")):
        with pytest.raises(UserError, match=r"cannot read a parquet file: got .*train-0\.parquet.*hint"):
            fails()
    assert list((tmp_path / "spool").iterdir()) == []


def test_a_row_without_bytes_is_refused_when_it_is_read(tmp_path):
    write(tmp_path / "train.parquet", [(b"1", "1.jpg", 0), (None, "/etc/passwd", 0)])
    [source] = find_sources(tmp_path, None)
    with pytest.raises(UserError, match=r"a row holds no image: got .*train\.parquet: row 1; hint: write the bytes"):
        contents(source, tmp_path / "spool")
    assert list((tmp_path / "spool").iterdir()) == []
    assert contents(source, tmp_path / "spool", np.array([0])) == {"0/1.jpg": (0, b"1")}


def test_a_full_disk_is_explained(tmp_path, monkeypatch):
    write(tmp_path / "train.parquet", [(b"1", "1.jpg", 0)])
    [source] = find_sources(tmp_path, None)
    original = os.fdopen
    monkeypatch.setattr(parquet_source.os, "fdopen", lambda *args, **options: original(*args[:2], 0))
    monkeypatch.setattr(parquet_source.tempfile, "mkstemp", lambda **options: (os.open("/dev/full", os.O_WRONLY), made))
    made = str(tmp_path / "spool")
    Path(made).touch()
    with (
        pytest.raises(UserError, match=r"cannot write the images.*No space left.*hint: free"),
        spooled(source, np.arange(1), tmp_path),
    ):
        pass
    assert not Path(made).exists()


# A run that spools a parquet folder's first sample and is then killed.
HOLD = """
import sys, time
from pathlib import Path
import numpy as np
from data_prep.sources.discover import find_sources, spooled
with spooled(find_sources(Path(sys.argv[1]), None)[0], np.arange(1), Path(sys.argv[2])):
    time.sleep(60)
"""


def test_what_a_killed_run_left_is_removed_and_what_a_living_one_holds_is_not(tmp_path):
    write(tmp_path / "train.parquet", [(b"1", "1.jpg", 0)])
    [source] = find_sources(tmp_path, None)
    folder = tmp_path / "spool"
    folder.mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path, folder], cwd=ROOT)
    while process.poll() is None and not [path for path in folder.iterdir() if path.stat().st_size]:
        time.sleep(0.01)
    [theirs] = folder.iterdir()
    with spooled(source, np.arange(1), folder) as readable:
        assert len(list(folder.iterdir())) == 2
        assert read_place(readable.root, readable.place(0)) == b"1"
    assert list(folder.iterdir()) == [theirs]
    process.kill()
    process.wait()
    with spooled(source, np.arange(1), folder):
        assert theirs not in folder.iterdir()
    assert list(folder.iterdir()) == []


def test_where_locks_are_a_host_s_own_no_other_host_s_spool_is_removed(tmp_path, monkeypatch):
    write(tmp_path / "train.parquet", [(b"1", "1.jpg", 0)])
    [source] = find_sources(tmp_path, None)
    folder = tmp_path / "spool"
    folder.mkdir()
    monkeypatch.setattr(parquet_source.fcntl, "flock", lambda *_: None)  # nobody's lock is seen here
    kept = []
    for host in ("node-1.a", "node", "node-1", "Node*[/", "node-12"):
        monkeypatch.setattr(parquet_source.socket, "gethostname", lambda host=host: host)
        with spooled(source, np.arange(1), folder):
            kept.append(next(path for path in folder.iterdir() if path not in kept))
            copy = kept[-1].read_bytes()
        kept[-1].write_bytes(copy)  # as if it were still there
        assert sorted(folder.iterdir()) == sorted(kept)
    with spooled(source, np.arange(1), folder):
        assert kept.pop() not in folder.iterdir(), "a host removes its own"
        assert set(kept) < set(folder.iterdir())


def test_without_pyarrow_the_hint_names_it(tmp_path, monkeypatch):
    write(tmp_path / "train.parquet", [(b"1", "1.jpg", 0)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pyarrow, which is missing; hint: pip install pyarrow"):
        find_sources(tmp_path, None)


rows = st.lists(st.tuples(st.binary(max_size=300), st.none(), st.integers(0, 3)), min_size=1, max_size=30)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows, st.integers(1, 7), st.integers(1, 3), st.data())
def test_each_chosen_sample_has_the_bytes_of_its_row(tmp_path_factory, monkeypatch, rows, group, num_files, data):
    monkeypatch.setattr(parquet_source, "_ROWS_AT_ONCE", 2)
    folder = tmp_path_factory.mktemp("rows")
    for number in range(num_files):
        write(folder / f"{number}.parquet", rows[number::num_files], row_group_size=group)
    rows = [row for number in range(num_files) for row in rows[number::num_files]]
    [source] = find_sources(folder, None)
    chosen = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), unique=True)), np.int64)
    for path, (label, image) in contents(source, folder / "spool", chosen).items():
        assert rows[int(path.split("/")[1])] == (image, None, label)
