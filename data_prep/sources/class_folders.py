"""A tree of class folders: the files in it, and what must not lie beside them."""

import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from gcvit.errors import UserError

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".gz", ".7z", ".rar")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
LAYOUT = "SOURCE/CLASS/image files, or SOURCE/train/CLASS and SOURCE/val/CLASS"


def list_tree(root: Path) -> list[str]:
    """CLASS/name of each file below `root`, sorted by class and then by path; hidden files are left out.

    Errors: UserError for no class folders, one without files, an image or archive outside of them.
    """
    folders, files = list_folder(root)
    refuse_loose(root, files)
    if not folders:
        raise UserError("the source holds no class folders", got=root, expected=LAYOUT, hint="check the path")
    paths: list[str] = []
    for name in sorted(folders):
        found = sorted(_walk(root, name))
        if not found:
            raise UserError("a class folder holds no images", got=root / name, hint="remove it or fill it")
        paths += found
    return paths


def group_classes(paths: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each class of the paths CLASS/name, which are sorted by class, with its paths."""
    for name, group in groupby(paths, key=lambda path: path.partition("/")[0]):
        yield name, list(group)


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in `folder`; links are followed, hidden names left out."""
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise UserError("cannot read a source folder", got=f"{folder} ({error.strerror})") from None
    return folders, files


def refuse_loose(root: Path, files: list[str]) -> None:
    """Images and archives beside the class folders would be lost in silence; other files may stay."""
    for name in sorted(files):
        if name.lower().endswith(ARCHIVES):
            what, hint = "an archive in place of a class folder", "unpack or remove it"
        elif name.lower().endswith(PICTURES):
            what, hint = "an image outside a class folder", "move or remove it"
        else:
            continue
        raise UserError(what, got=root / name, expected=LAYOUT, hint=hint)


def _walk(root: Path, folder: str) -> Iterator[str]:
    folders, files = list_folder(root / folder)
    for name in files:
        yield f"{folder}/{name}"
    for name in folders:
        yield from _walk(root, f"{folder}/{name}")
