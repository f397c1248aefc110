"""List a tree of class folders, and refuse images and archives beside them."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from gcvit.data.image_files import has_image_suffix, list_folder, walk_files
from gcvit.errors import UserError

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".gz", ".7z", ".rar")
LAYOUT = "SOURCE/CLASS/image files, or SOURCE/train/CLASS and SOURCE/val/CLASS"


def list_tree(root: Path) -> list[str]:
    """List CLASS/name of each file below `root`, sorted by class and then by path; hidden files are left out.

    Raises:
        UserError: There are no class folders, one holds no files, or an image or archive lies beside them.
    """
    folders, files = list_folder(root)
    refuse_loose(root, files)
    if not folders:
        raise UserError("the source holds no class folders", got=root, expected=LAYOUT, hint="check the path")
    paths: list[str] = []
    for name in sorted(folders):
        found = sorted(walk_files(root, name))
        if not found:
            raise UserError("a class folder holds no images", got=root / name, hint="remove it or fill it")
        paths += found
    return paths


def group_classes(paths: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each class of the paths CLASS/name, which are sorted by class, with its paths."""
    for name, group in groupby(paths, key=lambda path: path.partition("/")[0]):
        yield name, list(group)


def refuse_loose(root: Path, files: list[str]) -> None:
    """Refuse images and archives beside the class folders, which would be ignored in silence; others may stay."""
    for name in sorted(files):
        if name.lower().endswith(ARCHIVES):
            what, hint = "an archive in place of a class folder", "unpack or remove it"
        elif has_image_suffix(name):
            what, hint = "an image outside a class folder", "move or remove it"
        else:
            continue
        raise UserError(what, got=root / name, expected=LAYOUT, hint=hint)
