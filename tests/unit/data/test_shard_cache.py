"""The cache holds what was asked for, within its budget, whatever lies in its folder; `file://` plays the remote."""

import hashlib
import os
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcvit.data import download
from gcvit.data.download import lock_file
from gcvit.data.manifest import COLUMNS, Shard, read_manifest, write_manifest
from gcvit.data.shard_cache import CACHE_FOLDER, Cached, Prefetcher, ShardCache, choose_victims, fetch_manifest
from gcvit.errors import UserError

SIZE = 1000


@pytest.fixture(autouse=True)
def files_are_remote(monkeypatch):
    monkeypatch.setitem(download.PACKAGES, "file", "fsspec")
    monkeypatch.setattr(download, "FIRST_DELAY_S", 0.001)


def write_remote(folder: Path, split: str = "train", num_shards: int = 4, salt: int = 0) -> tuple[Shard, ...]:
    """A split whose shards are `SIZE` random bytes each and hold one sample each; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(salt)
    shards = []
    for number in range(num_shards):
        content = random.bytes(SIZE)
        (folder / f"{split}-{number:06d}.tar").write_bytes(content)
        shards.append(Shard(f"{split}-{number:06d}.tar", 1, SIZE, hashlib.sha256(content).hexdigest()))
    columns = {name: np.full(num_shards, 1 + salt, dtype) for name, dtype in COLUMNS.items()}
    write_manifest(folder, split, ("cat", "dog"), shards, columns)
    return tuple(shards)


def open_cache(tmp_path: Path, max_bytes: int | None = None, **options) -> ShardCache:
    shards = write_remote(tmp_path / "far/train")
    url, folder = fetch_manifest(f"file://{tmp_path}/far", "train", tmp_path / "near")
    return ShardCache(url, folder, shards, max_bytes, **options)


def read(cache: ShardCache, number: int) -> bytes:
    descriptor = cache.open(number)
    try:
        return os.pread(descriptor, 10 * SIZE, 0)
    finally:
        os.close(descriptor)


def tars(tmp_path: Path) -> list[int]:
    """Numbers of the shards that are here."""
    return sorted(int(path.stem.rpartition("-")[2]) for path in (tmp_path / "near" / CACHE_FOLDER).glob("*/*.tar"))


def age(tmp_path: Path, number: int, seconds: float) -> None:
    (path,) = (tmp_path / "near" / CACHE_FOLDER).glob(f"*/train-{number:06d}.tar")
    os.utime(path, (time.time() - seconds,) * 2)


def leftovers(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "near").rglob("*") if path.name == "lock" or path.suffix == ".part"]


@given(
    sizes=st.lists(st.integers(1, 100), max_size=12),
    used=st.lists(st.integers(0, 5), min_size=12, max_size=12),
    to_free=st.integers(-50, 1500),
)
def test_the_least_recently_used_go_and_no_more_than_needed(sizes, used, to_free):
    cached = [Cached(Path(str(i)), size, used[i]) for i, size in enumerate(sizes)]
    victims = choose_victims(cached, to_free)
    freed = sum(victim.num_bytes for victim in victims)
    assert len(set(victims)) == len(victims)
    assert freed >= min(to_free, sum(sizes))
    if victims:
        assert freed - victims[-1].num_bytes < to_free
        kept = set(cached) - set(victims)
        assert all(victim.used_ns <= shard.used_ns for victim in victims for shard in kept)


def test_a_shard_is_brought_once_and_then_read_here(tmp_path):
    cache = open_cache(tmp_path)
    far = [(tmp_path / f"far/train/train-{number:06d}.tar") for number in range(4)]
    content = far[2].read_bytes()
    assert read(cache, 2) == content
    far[2].unlink()
    assert read(cache, 2) == content
    assert tars(tmp_path) == [2]
    assert not leftovers(tmp_path)


def test_it_pickles_to_little_and_works_on(tmp_path):
    cache = open_cache(tmp_path)
    pickled = pickle.dumps(cache)
    assert len(pickled) < 1500
    assert read(pickle.loads(pickled), 1) == read(cache, 1)  # noqa: S301


def test_the_budget_evicts_what_was_used_longest_ago(tmp_path):
    cache = open_cache(tmp_path, max_bytes=2 * SIZE + 1)
    for number in (0, 1):
        read(cache, number)
        age(tmp_path, number, 100)
    read(cache, 0)  # touches it
    descriptor = cache.open(1)
    age(tmp_path, 1, 100)
    read(cache, 2)
    assert tars(tmp_path) == [0, 2]
    assert len(os.pread(descriptor, 2 * SIZE, 0)) == SIZE  # evicted, and read on
    os.close(descriptor)
    assert not leftovers(tmp_path)


def test_two_data_sets_share_a_budget_and_nothing_else(tmp_path):
    mine = tmp_path / "near/mine/mine-000000.tar"  # a cache directory in which the user keeps tars
    mine.parent.mkdir(parents=True)
    mine.write_bytes(bytes(50 * SIZE))
    cache = open_cache(tmp_path, max_bytes=2 * SIZE)
    other_shards = write_remote(tmp_path / "other", salt=1)
    url, folder = fetch_manifest(f"file://{tmp_path}/other", "train", tmp_path / "near")
    other = ShardCache(url, folder, other_shards, 2 * SIZE)
    assert read(cache, 0) != read(other, 0)
    age_all = [path for path in (tmp_path / "near").rglob("*.tar") if path != mine]
    assert len(age_all) == 2
    os.utime(folder / "train-000000.tar")
    read(other, 1)
    assert sorted(path.name for path in folder.glob("*.tar")) == ["train-000000.tar", "train-000001.tar"]
    assert mine.exists()


def test_what_a_killed_process_left_is_neither_counted_nor_kept(tmp_path):
    cache = open_cache(tmp_path, max_bytes=SIZE)
    stale = [cache._folder / f"train-00000{number}.tar.part" for number in (1, 3)]
    for path in stale:
        path.write_bytes(b"x" * 5 * SIZE)
    assert read(cache, 1) == (tmp_path / "far/train/train-000001.tar").read_bytes()
    assert not leftovers(tmp_path)


def test_a_shard_under_way_elsewhere_is_waited_for_and_counted(tmp_path):
    cache = open_cache(tmp_path, max_bytes=SIZE)
    part = cache._folder / "train-000003.tar.part"
    opened = threading.Event()

    def open_another() -> None:
        read(cache, 0)
        opened.set()

    with lock_file(part) as file:
        assert file is not None
        file.truncate(SIZE)
        thread = threading.Thread(target=open_another)
        thread.start()
        assert not opened.wait(0.3)
        cache.prefetch(3, threading.Event())  # does not wait for it
    thread.join()
    assert opened.is_set()


def test_a_shard_of_another_size_here_is_brought_anew(tmp_path):
    cache = open_cache(tmp_path)
    content = read(cache, 0)
    path = cache._folder / "train-000000.tar"
    path.write_bytes(content[:-1])
    assert read(cache, 0) == content


def test_a_wrong_hash_for_ever_is_told_and_leaves_nothing(tmp_path):
    cache = open_cache(tmp_path, max_bytes=SIZE, say=lambda _: None)
    path = tmp_path / "far/train/train-000000.tar"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(UserError, match=r"train-000000.tar \(5 tries, the last: SHA-256 .* instead of"):
        cache.open(0)
    assert tars(tmp_path) == []
    assert not leftovers(tmp_path)
    read(cache, 1)


@pytest.mark.parametrize("name", ["../a.tar", "a/b.tar", "manifest.json", "manifest.label.npy", "a.tar.gz", "..", ""])
def test_a_name_that_is_no_plain_tar_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="a remote shard's name"):
        ShardCache("file:///x", tmp_path / CACHE_FOLDER / "train-0", (Shard(name, 1, 1, None),), None)


def test_a_budget_below_a_shard_is_refused(tmp_path):
    with pytest.raises(UserError, match="smaller than a shard: got 999; expected: 1000 or more"):
        open_cache(tmp_path, max_bytes=SIZE - 1)


@pytest.mark.parametrize("inner", ["", "/train"])
def test_a_manifest_is_brought_with_its_columns(tmp_path, inner):
    shards = write_remote(Path(f"{tmp_path}/far{inner}"))
    url, folder = fetch_manifest(f"file://{tmp_path}/far", "train", tmp_path / "near")
    assert url == f"file://{tmp_path}/far{inner}"
    manifest = read_manifest(folder, check_shards=False)
    assert manifest.shards == shards
    assert not leftovers(tmp_path)


def test_columns_stay_and_are_mended(tmp_path):
    write_remote(tmp_path / "far")
    fetch = (f"file://{tmp_path}/far", "train", tmp_path / "near")
    _, folder = fetch_manifest(*fetch)
    before = {path.name: (path.read_bytes(), path.stat().st_ino) for path in folder.glob("*.npy")}
    assert len(before) == len(COLUMNS)
    (folder / "manifest.label.npy").write_bytes(b"corrupt")
    (folder / "manifest.offset.npy").unlink()
    assert fetch_manifest(*fetch) == (fetch[0], folder)
    after = {path.name: (path.read_bytes(), path.stat().st_ino) for path in folder.glob("*.npy")}
    assert {name: content for name, (content, _) in after.items()} == {n: content for n, (content, _) in before.items()}
    assert after["manifest.length.npy"] == before["manifest.length.npy"]  # not brought again


def test_a_changed_manifest_is_noticed_and_its_shards_are_not_mixed_up(tmp_path):
    cache = open_cache(tmp_path)
    old = read(cache, 0)
    shards = write_remote(tmp_path / "far/train", salt=1)
    url, folder = fetch_manifest(f"file://{tmp_path}/far", "train", tmp_path / "near")
    assert folder != cache._folder
    assert read(ShardCache(url, folder, shards, None), 0) != old


def test_a_corrupt_column_there_is_told(tmp_path):
    write_remote(tmp_path / "far")
    (tmp_path / "far/manifest.label.npy").write_bytes(b"corrupt")
    with pytest.raises(UserError, match=r"manifest.label.npy \(5 tries, the last: no column of numbers"):
        fetch_manifest(f"file://{tmp_path}/far", "train", tmp_path / "near", lambda _: None)


@pytest.mark.parametrize("content", ["{", "[]", "null", '"text"'])
def test_a_manifest_that_is_no_json_object_is_told(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest.json \(5 tries, the last: .* ?JSON"):
        fetch_manifest(f"file://{tmp_path}", "train", tmp_path / "near", lambda _: None)


@pytest.mark.parametrize("content", ["{}", '{"split": "train", "columns": []}', '{"split": "train"}'])
def test_a_malformed_manifest_is_left_to_its_reader(tmp_path, content):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/manifest.json").write_text(content)
    _, folder = fetch_manifest(f"file://{tmp_path}", "train", tmp_path / "near")
    with pytest.raises(UserError, match="malformed"):
        read_manifest(folder, check_shards=False)


def test_no_such_split_is_told_with_both_places(tmp_path):
    write_remote(tmp_path / "far", split="val")
    with pytest.raises(UserError, match=r"no split 'train'.*far/train/manifest.json.*far/manifest.json is for 'val'"):
        fetch_manifest(f"file://{tmp_path}/far", "train", tmp_path / "near")


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_prefetching_stays_within_its_window(tmp_path):
    cache = open_cache(tmp_path)
    prefetcher = Prefetcher(cache, [3, 0, 1, 2], window_bytes=2 * SIZE)
    wait_for(lambda: tars(tmp_path) == [0, 3])
    time.sleep(0.1)
    assert tars(tmp_path) == [0, 3]
    prefetcher.advance(1)
    wait_for(lambda: tars(tmp_path) == [0, 1, 3])
    prefetcher.advance(2)
    wait_for(lambda: tars(tmp_path) == [0, 1, 2, 3])
    prefetcher.close()


def test_prefetching_skips_what_the_stream_has_brought_itself(tmp_path):
    cache = open_cache(tmp_path)
    release = threading.Event()

    def order():
        yield 0
        release.wait()
        yield from (1, 2, 3)

    prefetcher = Prefetcher(cache, order(), window_bytes=SIZE)
    wait_for(lambda: tars(tmp_path) == [0])
    threading.Timer(0.05, release.set).start()
    prefetcher.advance(3)
    wait_for(lambda: tars(tmp_path) == [0, 3])
    prefetcher.close()


def test_a_failed_prefetch_is_said_and_the_shard_can_be_had_later(tmp_path):
    cache = open_cache(tmp_path)
    path = tmp_path / "far/train/train-000001.tar"
    path.rename(tmp_path / "hidden")
    said: list[str] = []
    prefetcher = Prefetcher(cache, [1, 2], window_bytes=4 * SIZE, say=said.append)
    wait_for(lambda: tars(tmp_path) == [2] and said)
    assert len(said) == 1
    assert "train-000001.tar" in said[0]
    with pytest.raises(UserError, match="not there"):
        cache.open(1)
    (tmp_path / "hidden").rename(path)
    assert read(cache, 1) == path.read_bytes()
    prefetcher.close()


def test_closing_ends_the_threads(tmp_path):
    before = threading.active_count()
    prefetcher = Prefetcher(open_cache(tmp_path), [0, 1, 2, 3], window_bytes=SIZE)
    assert threading.active_count() > before
    prefetcher.close()
    assert threading.active_count() == before
