"""Sample pictures: what the model was given in training, cut into tiles with what each counts as."""

from dataclasses import dataclass

from PIL import Image

from gcvit.report.formatting import count, percent
from gcvit.report.images import as_uri
from gcvit.report.run_data import Record, SampleGrid, number

_NUM_GRIDS = 2
_MAX_TILES = 32
_SIDE = 192  # pixels of a tile at most
_LEAST_SHARE = 0.02


@dataclass(frozen=True)
class Tile:
    picture: str
    label: str
    targets: str


@dataclass(frozen=True)
class Samples:
    title: str
    tiles: list[Tile]
    note: str


def show_samples(record: Record, several: bool) -> list[Samples]:
    """The first grid of the run and its newest; `several` says whether other runs stand beside it."""
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
    """[[class, share], ...] in words, the largest first, without what smoothing gives to every class."""
    pairs = [pair for pair in targets if isinstance(pair, list) and len(pair) == 2] if isinstance(targets, list) else []
    shares = [(str(name), share) for name, value in pairs if (share := number(value) or 0.0) > _LEAST_SHARE]
    shares.sort(key=lambda pair: -pair[1])
    return " · ".join(f"{name}: {percent(100 * share, 0)}" for name, share in shares[:3])


def read_grid(grid: SampleGrid) -> tuple[list[str], str]:
    """The tiles as URIs, one for each of the grid's entries, or none and a sentence that says why."""
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
    """Columns of a picture of square tiles whose last row may be short; None where they do not come out even."""
    width, height = size
    for num_columns in range(1, num_tiles + 1):
        num_rows = -(-num_tiles // num_columns)
        if width % num_columns == 0 and height == num_rows * (width // num_columns):
            return num_columns
    return None
