"""The parser of JPEG headers reads what Pillow reads, and walks all segments up to the pixels."""

import io

import pytest
from PIL import Image

from gcvit.data.jpeg_header import COMMENT, EXIF, START_OF_FRAME, START_OF_SCAN, Frame, iter_segments, read_frame


def encode(mode: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (40, 30)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def read_frames(content: bytes | memoryview) -> list[Frame]:
    return [read_frame(content, begin) for marker, begin, _ in iter_segments(content) if marker in START_OF_FRAME]


@pytest.mark.parametrize(("mode", "num_components"), [("L", 1), ("RGB", 3), ("CMYK", 4)])
@pytest.mark.parametrize("progressive", [False, True])
def test_the_frame_has_size_and_components(mode, num_components, progressive):
    content = encode(mode, progressive=progressive)
    expected = [Frame(precision=8, height=30, width=40, num_components=num_components)]
    assert read_frames(content) == read_frames(memoryview(content)) == expected


def test_segments_hold_their_payloads_and_end_with_the_scan():
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    content = encode("RGB", comment=b"a comment", exif=exif)
    payloads = {marker: content[begin:end] for marker, begin, end in iter_segments(content)}
    assert payloads[COMMENT] == b"a comment"
    assert payloads[EXIF] == exif.tobytes()
    assert list(payloads)[-1] == START_OF_SCAN


def test_fill_bytes_before_a_marker_are_skipped():
    content = encode("RGB")
    at = content.index(b"\xff\xc0")
    assert read_frames(content[:at] + b"\xff\xff\xff" + content[at:]) == read_frames(content)


def test_every_cut_before_the_scan_is_found():
    content = encode("RGB")
    for length in range(2, content.index(b"\xff\xda") + 4):
        with pytest.raises(IndexError):
            list(iter_segments(content[:length]))


def test_other_formats_have_no_segments():
    assert list(iter_segments(b"")) == list(iter_segments(b"\x89PNG\r\n\x1a\n")) == []
