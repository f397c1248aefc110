"""Pictures of the page as data URIs: tiles of training samples with their targets, and images of an evaluated set."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from gcvit.data.decode import DecodeError, decode
from gcvit.data.download import is_remote
from gcvit.data.source import open_source
from gcvit.errors import UserError
from gcvit.report.formatting import count, percent
from gcvit.report.run_data import Record, Row, SampleGrid, number

_NUM_GRIDS = 2
_MAX_TILES = 32
_SIDE = 192  # pixels of a tile at most
_LEAST_SHARE = 0.02
SIDE = 128
"""Side of a picture at most, in pixels: twice its size on the page, for fine screens."""


@dataclass(frozen=True)
class Tile:
    """A training sample: its picture as a URI, its label and its mixed targets."""

    picture: str
    label: str
    targets: str


@dataclass(frozen=True)
class Samples:
    """The tiles of one grid, and a sentence if they could not be read."""

    title: str
    tiles: list[Tile]
    note: str


def show_samples(record: Record, several: bool) -> list[Samples]:
    """Show the first grid of the run and its newest; `several` is whether the page has other runs."""
    grids = record.samples if len(record.samples) <= _NUM_GRIDS else [record.samples[0], record.samples[-1]]
    return [_show_grid(record, grid, several) for grid in grids]


def _show_grid(record: Record, grid: SampleGrid, several: bool) -> Samples:
    pictures, note = read_grid(grid)
    tiles = [
        Tile(picture, str(tile.get("label", "")), _describe_targets(tile.get("targets")))
        for picture, tile in zip(pictures, grid.tiles, strict=False)
    ]
    return Samples(f"{record.name}, step {count(grid.step)}" if several else f"Step {count(grid.step)}", tiles, note)


def _describe_targets(targets: object) -> str:
    """Format [[class, share], ...], the largest first, without the shares that smoothing gives to every class."""
    pairs = [pair for pair in targets if isinstance(pair, list) and len(pair) == 2] if isinstance(targets, list) else []
    shares = [(str(name), share) for name, value in pairs if (share := number(value) or 0.0) > _LEAST_SHARE]
    shares.sort(key=lambda pair: -pair[1])
    return " · ".join(f"{name}: {percent(100 * share, 0)}" for name, share in shares[:3])


def read_grid(grid: SampleGrid) -> tuple[list[str], str]:
    """Read the tiles as URIs, one for each entry of the grid, or none and a sentence with the reason."""
    name = grid.picture.name
    try:
        with Image.open(grid.picture, formats=("PNG",)) as image:
            image.load()
            num_columns = find_columns(image.size, len(grid.tiles))
            if num_columns is None:
                return [], f"{name} is no grid of {len(grid.tiles)} square tiles."
            side = image.width // num_columns
            places = [
                (i % num_columns * side, i // num_columns * side) for i in range(min(len(grid.tiles), _MAX_TILES))
            ]
            return [as_uri(image.crop((x, y, x + side, y + side)), _SIDE) for x, y in places], ""
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return [], f"{name} could not be read ({error})."


def find_columns(size: tuple[int, int], num_tiles: int) -> int | None:
    """Find the columns of a picture of square tiles with a short last row; None if no number of columns fits."""
    width, height = size
    for num_columns in range(1, num_tiles + 1):
        num_rows = -(-num_tiles // num_columns)
        if width % num_columns == 0 and height == num_rows * (width // num_columns):
            return num_columns
    return None


def as_uri(image: Image.Image, side: int = SIDE) -> str:
    """Encode a picture, no larger than `side`, as the data URI of an `<img>`."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.save(content, format="JPEG", quality=85, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def read_images(data: Row, indices: Iterable[int]) -> tuple[dict[int, str], str]:
    """Read images of an evaluation's set by number, as URIs, and a sentence on the missing ones, or "".

    `data` is an evaluation's "data": the folder of the set, and its digest.
    """
    place, split, digest = data.get("dir"), data.get("split"), data.get("sha256")
    wanted = sorted(set(indices))
    if not wanted:
        return {}, ""
    if not isinstance(place, str) or not isinstance(split, str):
        return {}, "The evaluation does not name the folder of its images, so there are no pictures."
    if is_remote(place):
        return {}, f"The images are on a server ({place}); a report downloads nothing, so there are no pictures."
    try:
        source = open_source(Path(place), split)
    except (UserError, OSError):
        return {}, f"The images are not at {place}/{split} any more, or not on this machine, so there are no pictures."
    if digest is not None and source.digest != digest:
        return {}, f"At {place}/{split} the data differs from what was evaluated, so there are no pictures."
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
    """Return the number of a mistake's sample in its set."""
    value = number(mistake.get("index"))
    return None if value is None else int(value)
