"""--repair removes corrupt samples from tars made by others, and nothing else in them."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import index, verify
from gcvit.data.manifest import read_manifest
from gcvit.errors import UserError


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x5A
    path.write_bytes(content)


def run(out: Path, *options: object) -> None:
    verify.main([str(out), "--workers", "1", *map(str, options)])


def add(path: Path, *members: tuple[str, bytes], mode: str = "a") -> None:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def samples(make_image: Callable[..., bytes], numbers: range) -> list[tuple[str, bytes]]:
    return [member for i in numbers for member in ((f"{i}.jpg", make_image(i)), (f"{i}.cls", b"%d" % (i % 2)))]


def refuse(path: Path, words: str) -> None:
    before = path.read_bytes()
    with pytest.raises(UserError, match=words):
        run(path.parent, "--repair")
    assert path.read_bytes() == before


def test_samples_that_a_stale_manifest_lacks_are_kept(tmp_path, make_image):
    path = tmp_path / "x-train-0.tar"
    add(path, *samples(make_image, range(5)), mode="w")
    index.main([str(tmp_path), "--workers", "1"])
    add(path, *samples(make_image, range(5, 9)))
    refuse(path, "may be valid: got x-train-0.tar: 5: the manifest lacks this sample and 3 more; .* index")
    flip(path, 0)  # the header of a sample of another size: a lost sample is not confused with a new one
    refuse(path, "the manifest lacks this sample")


@pytest.mark.parametrize("place", [50, -500])
def test_members_of_no_sample_are_kept(tmp_path, make_image, place, capsys):
    path = tmp_path / "x-train-0.tar"
    others = [("README.md", b"read me"), ("x.txt", b"x"), ("u.jpg", make_image(77) + b"more"), (".hidden", b"h")]
    add(path, *others[:2], *samples(make_image, range(4)), *others[2:], mode="w")
    index.main([str(tmp_path), "--workers", "1", "--checksums", "--skip-unusable"])
    flip(path, int(read_manifest(tmp_path).offset[2]) + place)
    run(tmp_path, "--repair")
    said = capsys.readouterr().out
    assert "1 left out, 3 remain" in said
    run(tmp_path)
    with tarfile.open(path) as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}
    kept = dict(samples(make_image, range(4)) + others)
    del kept["2.jpg"], kept["2.cls"]
    if place < 0:  # where a sample has lost its header, a name without extension may be of it
        assert f"{path}: removed .hidden" in said
        assert f"{path}: removed 2.cls" in said
        del kept[".hidden"]
    assert found == kept


@pytest.mark.parametrize("sample", [0, 4, 9])
def test_samples_without_an_optional_member_are_kept(tmp_path, make_image, sample):
    path = tmp_path / "x-train-0.tar"
    for i in range(10):
        text = [(f"{i}.txt", b"text")] if i < 6 else []
        add(path, *samples(make_image, range(i, i + 1)), *text, mode="a" if i else "w")
    index.main([str(tmp_path), "--workers", "1"])
    flip(path, int(read_manifest(tmp_path).offset[sample]) - 500)
    run(tmp_path, "--repair")
    with tarfile.open(path) as tar:
        names = tar.getnames()
    assert [name for name in names if name.endswith(".jpg")] == [f"{i}.jpg" for i in range(10) if i != sample]
    assert [name for name in names if name.endswith(".txt") and name != f"{sample}.txt"] == [
        f"{i}.txt" for i in range(6) if i != sample
    ]
