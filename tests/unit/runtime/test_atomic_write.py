"""A file is written whole or not at all, and nothing else remains."""

import os

import pytest

from gcvit.runtime.atomic_write import atomic_path, write_text


def test_an_existing_file_is_replaced(tmp_path):
    for text in ("first", "é" * 9999):
        write_text(tmp_path / "file.json", text)
        assert (tmp_path / "file.json").read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["file.json"]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_an_error_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, step):
    def fail(*_: object) -> None:
        raise OSError("full")

    write_text(tmp_path / "file", "old")
    if step != "write":
        monkeypatch.setattr(os, step, fail)

    def write() -> None:
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_text("new")
            if step == "write":
                fail()

    with pytest.raises(OSError, match="full"):
        write()
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_the_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (done.append(name), real(*args)))
    write_text(tmp_path / "file", "text")
    write_text(tmp_path / "file", "text", durable=False)
    assert done == ["fsync", "replace", "replace"]
