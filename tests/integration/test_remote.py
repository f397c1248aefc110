"""Shards over real HTTP, from a server that fails: what arrives is right, or the user is told; never a hang."""

import hashlib
import multiprocessing
import os
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from gcvit.data import download
from gcvit.data.download import Absent, lock_file
from gcvit.data.manifest import COLUMNS, Shard, read_manifest, write_manifest
from gcvit.data.shard_cache import CACHE_FOLDER, ShardCache, fetch_manifest
from gcvit.data.source import open_source
from gcvit.errors import UserError
from tests.helpers.flaky_server import FlakyServer, serve

SIZE = 300_000
NUM_SHARDS = 6


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(download, "FIRST_DELAY_S", 0.005)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FlakyServer]:
    """Serves tmp_path/far/train: a manifest and shards of `SIZE` random bytes."""
    folder = tmp_path / "far/train"
    folder.mkdir(parents=True)
    shards = []
    for number in range(NUM_SHARDS):
        content = random.Random(number).randbytes(SIZE)
        (folder / f"train-{number:06d}.tar").write_bytes(content)
        shards.append(Shard(f"train-{number:06d}.tar", 1, SIZE, hashlib.sha256(content).hexdigest()))
    columns = {name: np.arange(NUM_SHARDS).astype(dtype) for name, dtype in COLUMNS.items()}
    write_manifest(folder, "train", ("cat", "dog"), shards, columns)
    with serve(tmp_path / "far") as server:
        yield server


def open_cache(url: str, tmp_path: Path, max_bytes: int | None = None, say=download.say_on_stderr) -> ShardCache:
    url, folder = fetch_manifest(url, "train", tmp_path / "near", say)
    return ShardCache(url, folder, read_manifest(folder, check_shards=False).shards, max_bytes, say)


def read(cache: ShardCache, number: int) -> bytes:
    descriptor = cache.open(number)
    try:
        return os.pread(descriptor, 2 * SIZE, 0)
    finally:
        os.close(descriptor)


def expected(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE)


def leftovers(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "near").rglob("*") if path.name == "lock" or path.suffix == ".part"]


RETRIED = {
    "503": "HTTP|503",
    "500": "500",
    "429": "429",
    "408": "408",
    "cut": "ClientPayloadError",
    "cut unseen": f"{SIZE // 2} of {SIZE} bytes",
    "short": f"{SIZE // 2} of {SIZE} bytes",
    "long": f"more than {SIZE} bytes",
    "corrupt": "SHA-256",
    "silent": "no answer in time",
    "trickle": "bytes in",
}


@pytest.mark.parametrize(("failure", "reason"), RETRIED.items(), ids=RETRIED)
def test_what_may_pass_is_tried_again(server, tmp_path, monkeypatch, failure, reason):
    if failure in ("silent", "trickle"):
        monkeypatch.setattr(download, "READ_TIMEOUT_S", 0.3)
    said: list[str] = []
    cache = open_cache(server.url, tmp_path, say=said.append)
    server.failures["train/train-000001.tar"] = deque([failure, failure])
    assert read(cache, 1) == expected(1)
    assert server.gets["train/train-000001.tar"] == 3
    assert len(said) == 2
    assert any(part in said[1] for part in reason.split("|"))
    assert "train-000001.tar: " in said[1]
    assert "; try 3 of 5 in" in said[1]
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("failure", ["503", "cut", "corrupt"])
def test_a_failure_for_ever_is_told_after_the_last_try(server, tmp_path, failure):
    cache = open_cache(server.url, tmp_path, say=lambda _: None)
    server.forever["train/train-000001.tar"] = failure
    message = rf"{server.url}/train/train-000001.tar \(5 tries, the last: .*({RETRIED[failure]}).*hint"
    with pytest.raises(UserError, match=message):
        cache.open(1)
    assert server.gets["train/train-000001.tar"] == 5
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("status", ["404", "403", "401", "410"])
def test_a_refusal_is_told_at_once(server, tmp_path, status):
    cache = open_cache(server.url, tmp_path)
    server.forever["train/train-000001.tar"] = status
    with pytest.raises(Absent, match=r"train-000001.tar \(.*hint: check the URL"):
        cache.open(1)
    assert server.gets["train/train-000001.tar"] == 1


def test_a_server_that_is_gone_is_told(server, tmp_path):
    url, folder = fetch_manifest(server.url, "train", tmp_path / "near")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = url.replace(str(server.server_port), str(nobody.getsockname()[1]))
        cache = ShardCache(url, folder, (Shard("a.tar", 1, SIZE, None),), None, lambda _: None)
        with pytest.raises(UserError, match=r"5 tries, the last: Client.*Cannot connect"):
            cache.open(0)


def test_manifest_and_columns_survive_failures(server, tmp_path):
    server.failures["train/manifest.json"] = deque(["cut", "503", "cut unseen"])
    server.failures["train/manifest.offset.npy"] = deque(["short", "corrupt"])
    said: list[str] = []
    cache = open_cache(server.url, tmp_path, say=said.append)
    assert len(cache.shards) == NUM_SHARDS
    assert len(said) == 5
    assert server.gets["train/manifest.json"] == 4
    open_cache(server.url, tmp_path)
    # The manifest is asked for at each start, its columns once.
    assert server.gets["train/manifest.json"] == 5
    assert server.gets["train/manifest.label.npy"] == 1


def test_a_slow_download_is_said(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SLOW_S", 0.1)
    server.pause_s = 0.5
    said: list[str] = []
    cache = open_cache(server.url, tmp_path, say=said.append)
    server.failures["train/train-000000.tar"] = deque(["slow"])
    assert read(cache, 0) == expected(0)
    assert len(said) == 1
    assert said[0].startswith(f"{server.url}/train/train-000000.tar: 0.3 MB took ")


def test_secrets_are_sent_and_never_said(server, tmp_path, capfd):
    url = server.url.replace("http://", "http://user:SECRET@") + "?token=SECRET"
    server.failures["train/train-000000.tar"] = deque(["503", "cut", "corrupt", "silent"])
    server.forever["train/train-000001.tar"] = "404"
    server.pause_s = 0.1
    cache = open_cache(url, tmp_path)
    assert read(cache, 0) == expected(0)
    with pytest.raises(UserError) as caught:
        cache.open(1)
    assert server.targets[-1] == "/train/train-000001.tar?token=SECRET"
    out, err = capfd.readouterr()
    assert err.count("; try ") == 4
    names = " ".join(str(path) for path in (tmp_path / "near").rglob("*"))
    assert "SECRET" not in out + err + str(caught.value) + names + repr(cache)


# ---- several processes ------------------------------------------------------------------------------------------

SPAWN = multiprocessing.get_context("spawn")


def read_shards(url: str, tmp_path: Path, numbers: list[int], max_bytes: int | None, answers) -> None:
    """What a child does: each shard in turn, as often as it is named; answers how many were right, or the error."""
    download.FIRST_DELAY_S = 0.005
    try:
        cache = open_cache(url, tmp_path, max_bytes)
        answers.put(sum(read(cache, number) == expected(number) for number in numbers))
    except BaseException as error:
        answers.put(repr(error))
        raise


def start(context, *arguments) -> multiprocessing.Process:
    process = context.Process(target=read_shards, args=arguments, daemon=True)
    process.start()
    return process


def test_each_shard_is_fetched_once_for_all_processes(server, tmp_path):
    server.pause_s = 0.3
    for number in range(NUM_SHARDS):  # slow, so that the others come meanwhile
        server.failures[f"train/train-{number:06d}.tar"] = deque(["slow"])
    answers = SPAWN.Queue()
    order = list(range(NUM_SHARDS))
    children = [start(SPAWN, server.url, tmp_path, order[i:] + order[:i], None, answers) for i in (0, 0, 1, 3)]
    assert [answers.get(timeout=60) for _ in children] == [NUM_SHARDS] * len(children)
    assert {name: count for name, count in server.gets.items() if name.endswith((".tar", ".npy"))} == {
        **{f"train/train-{number:06d}.tar": 1 for number in order},
        **{f"train/manifest.{name}.npy": 1 for name in COLUMNS},
    }
    assert not leftovers(tmp_path)


def test_readers_with_a_budget_that_forces_eviction(server, tmp_path):
    budget = 2 * SIZE + SIZE // 2
    server.failures["train/train-000002.tar"] = deque(["cut", "corrupt"])
    answers = SPAWN.Queue()
    numbers = [[random.Random(i * 100 + k).randrange(NUM_SHARDS) for k in range(40)] for i in range(3)]
    children = [start(SPAWN, server.url, tmp_path, numbers[i], budget, answers) for i in range(3)]
    root = tmp_path / "near" / CACHE_FOLDER
    root.mkdir(parents=True, exist_ok=True)
    most = 0
    while any(child.is_alive() for child in children):
        held = 0
        with lock_file(root / "lock"):  # nobody evicts or begins
            for pattern in ("*/*.tar", "*/*.tar.part"):  # in this order one that is complete meanwhile counts once
                for path in root.glob(pattern):
                    with suppress(FileNotFoundError):
                        held += path.stat().st_size
        most = max(most, held)
        time.sleep(0.005)
    assert [answers.get(timeout=60) for _ in children] == [40] * 3
    assert 2 * SIZE <= most <= budget
    assert not leftovers(tmp_path)


def test_who_waits_for_a_killed_process_finishes_its_work(server, tmp_path):
    server.pause_s = 60
    server.failures["train/train-000004.tar"] = deque(["slow"])
    answers = SPAWN.Queue()
    child = start(SPAWN, server.url, tmp_path, [4], 2 * SIZE, answers)
    try:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "near").rglob("*.part")) or not server.gets["train/train-000004.tar"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        cache = open_cache(server.url, tmp_path, 2 * SIZE)
        found: list[bytes] = []
        waiting = threading.Thread(target=lambda: found.append(read(cache, 4)))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        assert server.gets["train/train-000004.tar"] == 1
    finally:
        child.kill()
    waiting.join(10)
    assert found == [expected(4)]
    assert server.gets["train/train-000004.tar"] == 2
    assert not leftovers(tmp_path)


def test_a_data_set_of_the_hugging_face_hub(server, tmp_path, monkeypatch):
    # All that this needs of the hub is its answer that there is such a data set, and where its files are.
    (tmp_path / "far/api/datasets/org/name").mkdir(parents=True)
    (tmp_path / "far/api/datasets/org/name/index.json").write_text('{"id": "org/name", "sha": "0", "siblings": []}')
    (tmp_path / "far/datasets/org/name/resolve").mkdir(parents=True)
    (tmp_path / "far/datasets/org/name/resolve/main").symlink_to(tmp_path / "far")
    server.failures["datasets/org/name/resolve/main/train/train-000001.tar"] = deque(["cut", "cut", "corrupt"])
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    answers = SPAWN.Queue()
    start(SPAWN, "hf://datasets/org/name", tmp_path, [0, 1], None, answers)
    assert answers.get(timeout=60) == 2


def test_a_forked_process_can_download_too(server, tmp_path):
    cache = open_cache(server.url, tmp_path)
    read(cache, 0)  # fsspec's thread runs in this process, and is not in the fork
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    child = fork.Process(target=lambda: answers.put(read(cache, 1) == expected(1)), daemon=True)
    child.start()
    assert answers.get(timeout=30) is True
    child.join(10)
    assert child.exitcode == 0


def test_shards_are_named_by_a_pattern(server, tmp_path):
    """With a token in the URL's query, which every request repeats."""
    cache_dir = str(tmp_path / "near")
    source = open_source(f"{server.url}/train/train-{{000000..000005}}.tar?key=a", "train", cache_dir)
    assert source.num_samples == NUM_SHARDS
    assert all(target.endswith("?key=a") for target in server.targets)
    with pytest.raises(UserError, match=r"train-000006\.tar is only in the pattern"):
        open_source(f"{server.url}/train/train-{{000000..000006}}.tar?key=a", "train", cache_dir)
