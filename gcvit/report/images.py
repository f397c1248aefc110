"""Pictures for the page, each as a small data URI: those of a data set by number."""

import base64
import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from gcvit.data.decode import DecodeError, decode
from gcvit.data.download import is_remote
from gcvit.data.source import open_source
from gcvit.errors import UserError
from gcvit.report.run_data import Row, number, section

SIDE = 128
"""Of a picture at most, in pixels: twice what the page shows, for fine screens."""


def as_uri(image: Image.Image, side: int = SIDE) -> str:
    """The picture, no larger than `side`, as the text that an `<img>` takes."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.save(content, format="JPEG", quality=85, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def read_images(data: Row, indices: Iterable[int]) -> tuple[dict[int, str], str]:
    """Images of an evaluation's set by number, as URIs; and a sentence on those that are missing, or nothing.

    `data` is an evaluation's "data": where the set lay, and the digest by which it is known again.
    """
    place, split, digest = data.get("dir"), data.get("split"), data.get("sha256")
    wanted = sorted(set(indices))
    if not wanted:
        return {}, ""
    if not isinstance(place, str) or not isinstance(split, str):
        return {}, "The evaluation does not say where its images lie, so there are no pictures."
    if is_remote(place):
        return {}, f"The images lie on a server ({place}); a report fetches nothing, so there are no pictures."
    try:
        source = open_source(Path(place), split)
    except (UserError, OSError):
        return {}, f"The images are not at {place}/{split} any more, or not on this machine, so there are no pictures."
    if digest is not None and source.digest != digest:
        return {}, f"At {place}/{split} there is other data now than was evaluated, so there are no pictures."
    pictures = {}
    for index in wanted:
        if not 0 <= index < source.num_samples:
            continue
        try:
            (content,) = source.fetch(index, index + 1)
            source.check(index, content)
            pictures[index] = as_uri(decode(content, upright=True))
        except (UserError, DecodeError):
            continue
    num_lost = len(wanted) - len(pictures)
    return pictures, f"{num_lost} of the pictures could not be read." if num_lost else ""


def index_of(mistake: Row) -> int | None:
    """The number of a mistake's sample in its set."""
    value = number(mistake.get("index"))
    return None if value is None else int(value)


def data_of(evaluation: Row) -> Row:
    return section(evaluation, "data")
