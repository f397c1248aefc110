"""tar_reader agrees with tarfile on every valid tar, and names the place of corruption in every other."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.shards.tar_reader import BrokenTar, Member, TarReader

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
KINDS = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CONTTYPE)
# Names up to ustar's 100 + 155 bytes and beyond, in one folder or in many, with letters of one to four bytes.
part = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=60)
names = st.one_of(st.lists(part, min_size=1, max_size=8).map("/".join), part.map(lambda text: (text * 20)[:200]))


def write_tar(path: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def read_tar(path: Path) -> list[Member]:
    with TarReader(path) as tar:
        return list(tar.members())


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.lists(st.tuples(names, st.integers(0, 3000), st.sampled_from(KINDS)), max_size=8),
)
def test_members_are_those_of_tarfile(tmp_path_factory, tar_format, wanted):
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, size, kind in wanted:
            info = tarfile.TarInfo(name)
            if kind == tarfile.AREGTYPE and len(name.encode()) > 99:
                kind = tarfile.REGTYPE  # of a long name cut at a slash, tarfile takes the rest for a folder's
            info.type, info.linkname = kind, name if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.size = size if info.isreg() else 0
            try:
                tar.addfile(info, io.BytesIO(b"x" * size))
            except ValueError:  # ustar cannot hold the name
                assert tar_format == tarfile.USTAR_FORMAT
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
    assert read_tar(path) == expected


def test_sizes_beyond_octal_digits_are_read(tmp_path):
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("a.jpg")
        info.size = 9 << 30  # more than 11 octal digits hold: base 256 in GNU's format, a record in pax
        path = tmp_path / "x.tar"
        with open(path, "wb") as file:
            header = info.tobuf(tar_format)
            file.write(header)
            file.truncate(len(header) + info.size + 1024)
        assert read_tar(path) == [("a.jpg", len(header), 9 << 30)]


@pytest.mark.parametrize("tar_format", FORMATS)
def test_every_truncation_and_flipped_header_is_found(tmp_path, tar_format):
    path = tmp_path / "x.tar"
    members = [("a/1.jpg", b"a" * 700), ("b" * 120 + "/2.jpg", b"b" * 512), ("c/3.cls", b"3")]
    write_tar(path, members, tar_format)
    valid, found = path.read_bytes(), read_tar(path)
    end = found[-1][1] + 512
    for size in range(0, end + 512, 512):
        path.write_bytes(valid[:size])
        with pytest.raises(BrokenTar):
            read_tar(path)
    for place in range(end):
        if valid[place // 512 * 512 :][257:262] != b"ustar":
            continue  # a payload (long names are one too), which has no checksum of its own
        path.write_bytes(valid[:place] + bytes([valid[place] ^ 1]) + valid[place + 1 :])
        try:
            assert read_tar(path) == found  # a byte that says nothing, such as what follows a name's end
        except BrokenTar as error:
            assert error.position <= place  # noqa: PT017


def test_a_sound_header_is_found_behind_a_corrupt_one(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [("1.jpg", b"a" * 5000), ("2.jpg", b"b" * 600), ("3.jpg", b"c")])
    data, (_, second, third) = bytearray(path.read_bytes()), read_tar(path)
    data[second[1] - 512] ^= 1
    path.write_bytes(data)
    with TarReader(path) as tar:
        with pytest.raises(BrokenTar, match="corrupt header") as caught:
            list(tar.members())
        assert caught.value.position == second[1] - 512
        place = tar.find_header(caught.value.position + 512)
        assert place == third[1] - 512
        assert list(tar.members(place)) == [third]
        assert tar.find_header(third[1]) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no tar"),
        (b"text", "no tar"),
        (b"\x1f\x8b" + bytes(2000), "compressed with gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(2000), "compressed with zstd"),
        (bytes(512) + b"x" * 512, "an empty block before the end"),
    ],
)
def test_what_is_no_tar_is_refused(tmp_path, content, words):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(BrokenTar, match=words):
        read_tar(tmp_path / "x.tar")


def mark_size(header: bytes, size: int) -> bytes:
    """The header with a size in base 256, and the checksum that it needs then."""
    block = bytearray(header)
    block[124:136] = b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=1), st.one_of(st.integers(1, 1 << 20), st.integers(1, (1 << 88) - 1)))
def test_any_size_of_any_kind_is_read_or_refused(tmp_path_factory, kind, size):
    info = tarfile.TarInfo("a.jpg")
    info.type = kind
    path = tmp_path_factory.getbasetemp() / "sizes.tar"
    path.write_bytes(mark_size(info.tobuf(tarfile.USTAR_FORMAT), size) + bytes(4096))
    with TarReader(path) as tar:
        try:
            assert all(offset + length <= tar.num_bytes for _, offset, length in tar.members())
        except BrokenTar:
            assert tar.salvage()[1]


def test_a_remark_longer_than_its_tar_is_refused(tmp_path):
    info = tarfile.TarInfo("pax")
    info.type = tarfile.XGLTYPE
    for size in (1 << 13, 0x7F << 80):
        (tmp_path / "x.tar").write_bytes(mark_size(info.tobuf(tarfile.USTAR_FORMAT), size) + bytes(1024))
        with pytest.raises(BrokenTar, match=r"truncated$"):
            read_tar(tmp_path / "x.tar")


def test_sparse_members_and_absurd_headers_are_refused(tmp_path):
    def refuse(data: bytes, words: str) -> None:
        (tmp_path / "x.tar").write_bytes(data + bytes(1024))
        with pytest.raises(BrokenTar, match=words):
            read_tar(tmp_path / "x.tar")

    info = tarfile.TarInfo("a.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    refuse(info.tobuf(tarfile.GNU_FORMAT), "sparse")
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"GNU.sparse.major": "1"}
    refuse(info.tobuf(tarfile.PAX_FORMAT), "sparse")
    for bad in (b"99 path=x\n", b"x path=x\n", b"-5 path=x\n", b"0 path=x\n", b"7 size=\n", b"9 size=-\n"):
        info = tarfile.TarInfo("pax")
        info.type, info.size = tarfile.XHDTYPE, len(bad)
        refuse(info.tobuf() + bad + bytes(-len(bad) % 512), "corrupt pax header")
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    refuse(info.tobuf(tarfile.GNU_FORMAT), "extended header of")
