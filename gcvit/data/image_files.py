"""Image files in folders: their formats and suffixes, and the walk of a class folder. Loads no torch."""

import os
from collections.abc import Iterator
from pathlib import Path

from gcvit.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow's names
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 1 << 27  # 400 MB when decoded: larger than any photograph, and short of a machine's memory


def has_image_suffix(path: str) -> bool:
    """Return whether the name ends as that of an image."""
    return path.lower().endswith(SUFFIXES)


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """List the names of the folders and of the files in `folder`; links are followed, hidden names left out.

    Raises:
        UserError: The folder cannot be read.
    """
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise UserError("cannot read a folder of images", got=f"{folder} ({error.strerror})") from None
    return folders, files


def walk_files(root: Path, folder: str = "") -> Iterator[str]:
    """Yield the path relative to `root` of each file in and below `root / folder`, as `list_folder` finds them."""
    folders, files = list_folder(root / folder)
    head = f"{folder}/" if folder else ""
    for name in files:
        yield head + name
    for name in folders:
        yield from walk_files(root, head + name)
