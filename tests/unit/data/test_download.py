"""URLs are joined and printed as they must be; a file is made by one process at a time; mistakes have their hint."""

import io
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcvit.data import download as module
from gcvit.data.download import Absent, Stopped, download, is_remote, join, lock_file, redact
from gcvit.errors import UserError

NASTY = st.text(alphabet="ab1/?#@:[]%.-_ é", max_size=12)


@pytest.fixture(autouse=True)
def files_are_remote(monkeypatch):
    monkeypatch.setitem(module.PACKAGES, "file", "fsspec")
    monkeypatch.setattr(module, "FIRST_DELAY_S", 0.001)


def good(content: bytes = b"") -> None:
    """A check that finds nothing."""


@pytest.mark.parametrize("url", ["s3://a", "https://h/x", "hf://datasets/o/n", "gs://b", "x+y://z", "S3://a"])
def test_urls_are_remote(url):
    assert is_remote(url)


@pytest.mark.parametrize("path", ["data", "/data/in", "./s3:/a", "a/b://c", "C:\\data", "://", "datasets/ILSVRC:2012"])
def test_paths_are_local(path):
    assert not is_remote(path)


@pytest.mark.parametrize(
    ("url", "name", "joined"),
    [
        ("s3://bucket/in/", "a b.tar", "s3://bucket/in/a b.tar"),
        ("hf://datasets/org/name@main", "a.tar", "hf://datasets/org/name@main/a.tar"),
        ("https://host", "a.tar", "https://host/a.tar"),
        ("https://host/in/?sig=a%2Fb&x", "a#b?%c.tar", "https://host/in/a%23b%3F%25c.tar?sig=a%2Fb&x"),
        ("http://user:pw@host:80/in#part", "a.tar", "http://user:pw@host:80/in/a.tar"),
    ],
)
def test_join(url, name, joined):
    assert join(url, name) == joined


def test_a_url_that_cannot_be_parsed_is_told():
    with pytest.raises(UserError, match=r"cannot be parsed: got https://\.\.\."):
        join("https://user:SECRET@[host/in", "a.tar")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host.org:8443/in/train", "https://host.org:8443/in/train"),
        ("https://user:pw@host/in?sig=x#y", "https://host/in"),
        ("http://[::1]:80/in", "http://[::1]:80/in"),
        ("s3://bucket/in", "s3://bucket/in"),
        ("s3://key:secret@bucket/in", "s3://bucket/in"),
        ("hf://datasets/org/name@main/in", "hf://datasets/org/name@main/in"),
        ("https://user:p/w@host/in", "https://..."),
        ("https://user:12/w@host/in", "https://..."),
        ("https://user:pw", "https://..."),
    ],
)
def test_redact(url, shown):
    assert redact(url) == shown


@given(protocol=st.sampled_from(["http", "https"]), user=NASTY, before=NASTY, after=NASTY, path=NASTY, query=NASTY)
def test_no_password_and_no_query_is_ever_shown(protocol, user, before, after, path, query):
    userinfo = f"{user}:{before}SECRET{after}@"
    assert "SECRET" not in redact(f"{protocol}://{userinfo}host/{path}?{query}")
    assert "SECRET" not in redact(f"{protocol}://host/{path}?{query}SECRET")
    error = OSError(f"GET {protocol}://host/{path.replace(' ', '')}?{query.replace(' ', '')}SECRET failed")
    assert "SECRET" not in module._describe(error)


@given(url=st.text(), protocol=st.sampled_from(["", "https://", "s3://", "hf://"]))
def test_anything_can_be_redacted(protocol, url):
    assert isinstance(redact(protocol + url), str)


@pytest.mark.parametrize(
    ("url", "hidden", "message"),
    [
        ("https://host/a", "aiohttp", "https:// needs the package aiohttp; hint: pip install aiohttp"),
        ("s3://bucket/a", "s3fs", "pip install s3fs"),
        ("gs://bucket/a", "gcsfs", "pip install gcsfs"),
        ("hf://datasets/o/n/a", "huggingface_hub", "pip install huggingface_hub"),
        ("ftp://host/a", "none", "unknown protocol: got ftp://; expected: http://, https://, s3://, gs://, hf://"),
    ],
)
def test_what_a_protocol_needs(tmp_path, monkeypatch, url, hidden, message):
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(UserError, match=message), open(tmp_path / "out", "w+b") as file:
        download(url, file, check=good)


def test_a_file_comes_whole_over_whatever_was_there(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "out").write_bytes(b"x" * 50)
    with open(tmp_path / "out", "r+b") as file:
        download(f"file://{tmp_path}/a", file, check=good)
    assert (tmp_path / "out").read_bytes() == b"0123456789"


@pytest.mark.parametrize(("num_bytes", "reason"), [(11, "10 of 11 bytes"), (9, "more than 9 bytes")])
def test_a_wrong_size_is_tried_again_and_then_told(tmp_path, num_bytes, reason):
    (tmp_path / "a").write_bytes(b"0123456789")
    said: list[str] = []
    with (
        open(tmp_path / "out", "w+b") as file,
        pytest.raises(UserError, match=rf"{tmp_path}/a \(5 tries, the last: {reason}\).*hint"),
    ):
        download(f"file://{tmp_path}/a", file, num_bytes=num_bytes, check=good, say=said.append)
    assert len(said) == 4
    assert f"{reason}; try 2 of 5 in" in said[0]


def test_what_is_not_there_is_told_at_once(tmp_path):
    said: list[str] = []
    with open(tmp_path / "out", "w+b") as file, pytest.raises(Absent, match=r"not there.*/a .*hint"):
        download(f"file://{tmp_path}/a", file, check=good, say=said.append)
    assert not said


def test_a_full_disk_is_told_at_once(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    with open("/dev/full", "r+b", buffering=0) as file, pytest.raises(UserError, match=r"No space left.*free space"):
        download(f"file://{tmp_path}/a", file, check=good)


def test_a_download_can_be_stopped(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        download(f"file://{tmp_path}/a", io.BytesIO(), check=good, stop=stop)


def test_one_holds_at_a_time_and_nothing_is_left(tmp_path):
    path = tmp_path / "part"
    inside, most = 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with lock_file(path) as file:
                assert file is not None
                with guard:
                    inside += 1
                    most = max(most, inside)
                file.write(b"x")
                file.flush()
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert not path.exists()


def test_who_does_not_wait_gets_none_and_who_renames_keeps(tmp_path):
    path, final = tmp_path / "part", tmp_path / "final"
    with lock_file(path) as file:
        assert file is not None
        with lock_file(path, wait=False) as other:
            assert other is None
        assert path.exists()
        file.write(b"all")
        path.rename(final)
        with lock_file(path, wait=False) as other:  # the name is free again, whoever still holds the file
            assert other is not None
    assert final.read_bytes() == b"all"
    assert list(tmp_path.iterdir()) == [final]


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path):
    with (
        pytest.raises(UserError, match=r"cannot write to the cache.*missing/part \(No such file"),
        lock_file(tmp_path / "missing/part"),
    ):
        pass
