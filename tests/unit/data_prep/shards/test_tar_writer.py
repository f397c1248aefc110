"""A tar's headers are tarfile's own, its offsets and its hash what a reader of it finds."""

import hashlib
import io
import tarfile

from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.shards.tar_writer import TarWriter, tar_header

names = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=300).filter(
    lambda name: not name.endswith("/")
)


@given(names, st.integers(0, 2**40))
@example("a" * 100, 8**11 - 1)
@example("a" * 101, 8**11 - 1)
@example("a" * 100, 8**11)
@example("d" * 155 + "/" + "n" * 100, 0)
@example("d" * 156 + "/" + "n" * 100, 0)
def test_a_header_is_tarfiles_own(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    try:
        expected = info.tobuf(tarfile.USTAR_FORMAT)
    except ValueError:
        expected = info.tobuf(tarfile.PAX_FORMAT)
    assert tar_header(name, size) == expected


@given(st.lists(st.lists(st.tuples(names, st.binary(max_size=1500)), min_size=1, max_size=4), max_size=5))
def test_tarfile_reads_what_was_added(samples):
    tar, expected = TarWriter(None), hashlib.sha256()
    buffer = io.BytesIO()
    tar.append = lambda *parts: (expected.update(b"".join(parts)), append(*parts), buffer.writelines(parts))
    append = TarWriter.append.__get__(tar)
    offsets = [tar.add(members) for members in samples]
    tar.finish()
    assert (tar.num_bytes, tar.sha256.digest()) == (len(buffer.getvalue()), expected.digest())
    assert tar.num_bytes % tarfile.RECORDSIZE == 0
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as theirs:
        members = theirs.getmembers()
        found = [(member.name, theirs.extractfile(member).read()) for member in members]
    assert found == [member for sample in samples for member in sample]
    firsts = [sum(map(len, samples[:i])) for i in range(len(samples))]
    assert offsets == [members[i].offset_data for i in firsts]
