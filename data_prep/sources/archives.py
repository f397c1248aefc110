"""Find images inside tars: class tars, a tar of class tars, ILSVRC's validation tar with its labels.

Nothing is unpacked. One pass reads the headers and skips the payloads. A sample is then a byte range of the outermost
file. A member's name names a sample and never becomes a path on disk.
"""

import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.shards.tar_reader import BrokenTar, Member, TarReader
from data_prep.sources.class_folders import ARCHIVES
from gcvit.errors import UserError

META = "data/meta.mat"
TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


class Spans(NamedTuple):
    """Byte ranges of samples: `length[i]` bytes at `offset[i]` of `files[file[i]]`; columns of shape [N]."""

    files: tuple[str, ...]
    file: np.ndarray
    offset: np.ndarray
    length: np.ndarray


class _Class(NamedTuple):
    """The images of one class: CLASS/name, sorted, and the ranges of their bytes."""

    paths: list[str]
    offset: np.ndarray
    length: np.ndarray


def first_member(tar: Path) -> str:
    """Return the name of the first file in `tar`, which shows the kind of archive; "" if it is empty."""
    return next((name for name, _, _ in list_files(tar)), "")


def scan_class_tars(folder: Path, files: list[str]) -> tuple[list[str], Spans]:
    """List CLASS/name of each image in the tars CLASS.tar in `folder`, sorted by class and then by name.

    Returns:
        The paths and the byte ranges of the images.

    Raises:
        UserError: A tar is compressed, corrupt or empty, or has a member that is no plain file.
    """
    files = sorted(files, key=_class_of)
    found = [_sort_class(_class_of(name), list_files(folder / name), str(folder / name)) for name in files]
    return _join(tuple(files), range(len(files)), found)


def scan_nested(tar: Path) -> tuple[list[str], Spans]:
    """List the images of a tar of class tars, like `scan_class_tars`; the spans' only file is "", that tar itself."""
    inner: dict[str, Member] = {}
    for path, offset, length in list_files(tar):
        name = path.rsplit("/", 1)[-1]
        if name.startswith("."):
            continue
        if not name.endswith(".tar") or _class_of(name) in inner:
            what = "two tars of one class" if name.endswith(".tar") else "a member that is no class tar"
            raise UserError(what, got=f"{tar}: {path}", expected="CLASS.tar, one each", hint="pack it again")
        inner[_class_of(name)] = (path, offset, length)
    found = [
        _sort_class(name, list_files(tar, member), f"{tar}: {member[0]}") for name, member in sorted(inner.items())
    ]
    return _join(("",), [0] * len(found), found)


def scan_validation(tar: Path, kit: Path) -> tuple[list[str], Spans, tuple[str, ...]]:
    """List WNID/name of each image in ILSVRC's validation tar, sorted.

    Returns:
        The paths, the byte ranges of the images, and the sorted WNIDs of all classes.

    Raises:
        UserError: An archive is corrupt, or the two do not belong together.
    """
    classes, wnid_of_image = read_kit(kit)
    members_of: dict[str, list[Member]] = {name: [] for name in classes}
    for path, offset, length in list_files(tar):
        match = _VAL_IMAGE.fullmatch(path.rsplit("/", 1)[-1])
        number = int(match[1]) if match else 0
        if match is None or not 1 <= number <= len(wnid_of_image):
            expected = f"ILSVRC2012_val_00000001.JPEG to {len(wnid_of_image):08d}, as {kit.name} lists them"
            raise UserError("an image without a label", got=f"{tar}: {path}", expected=expected)
        members_of[wnid_of_image[number - 1]].append((match[0], offset, length))
    num_images = sum(len(members) for members in members_of.values())
    if num_images != len(wnid_of_image):
        got = f"{num_images:,} images in {tar}, {len(wnid_of_image):,} labels in {kit}"
        raise UserError("images and labels of the validation set differ in number", got=got, hint="fetch both again")
    found = [_sort_class(name, members, str(tar)) for name, members in members_of.items() if members]
    return *_join(("",), [0] * len(found), found), classes


def read_kit(kit: Path) -> tuple[tuple[str, ...], list[str]]:
    """Read ILSVRC's development kit.

    The ground truth numbers the classes in an order of its own, which META translates: its synsets without children
    are the classes.

    Returns:
        The sorted WNIDs of the classes, and the WNID of each validation image in the order of their numbers.

    Raises:
        UserError: The kit is missing or cannot be read, or SciPy is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"the kit's {META} needs SciPy, which is missing", hint="pip install scipy") from None
    if not kit.exists():
        raise UserError("the labels of the validation images are missing", got=kit, hint="put it beside the images")
    try:
        data: dict[str, bytes] = {}
        with tarfile.open(kit) as tar:
            for member in tar:
                name = next((name for name in (META, TRUTH) if member.name.endswith(name)), None)
                if name is not None and member.isreg() and (file := tar.extractfile(member)) is not None:
                    data[name] = file.read()
        synsets = np.atleast_1d(loadmat(io.BytesIO(data[META]), squeeze_me=True)["synsets"])
        fields = [synsets[name] for name in ("ILSVRC2012_ID", "WNID", "num_children")]
        wnid_of = {int(number): str(wnid) for number, wnid, children in zip(*fields, strict=True) if int(children) == 0}
        wnid_of_image = [wnid_of[int(number)] for number in data[TRUTH].split()]
    except Exception as error:  # tarfile, zlib, loadmat and NumPy raise errors of many types for corrupt bytes
        got = f"{kit} ({type(error).__name__}: {' '.join(str(error).split())})"
        raise UserError("ILSVRC's development kit cannot be read", got=got, hint="fetch it again") from None
    if malformed := [wnid for wnid in wnid_of.values() if not re.fullmatch(r"n\d{8}", wnid)]:
        raise UserError("the development kit names no WordNet id", got=f"{kit}: {malformed[0]!r}", expected="n01440764")
    return tuple(sorted(wnid_of.values())), wnid_of_image


def list_files(tar: Path, inner: Member | None = None) -> Iterator[Member]:
    """Yield the files of a tar, or of the tar that is its member `inner`; offsets are those of the outer file.

    Raises:
        UserError: The tar is compressed, corrupt or truncated, has a member that is no plain file, or is unreadable.
    """
    name, begin, num_bytes = inner or ("", 0, None)
    try:
        with TarReader(tar, begin, num_bytes, read_ahead=False) as reader:
            for path, offset, length in reader.members(files_only=True):
                yield path, begin + offset, length
    except BrokenTar as error:
        where = f"{tar}: {name}" if inner else str(tar)
        got = f"{where} ({error}, at byte {error.position:,})"
        raise UserError("cannot use a tar", got=got, hint=error.hint) from None
    except OSError as error:
        raise UserError("cannot read an archive", got=f"{tar} ({error.strerror})") from None


def _class_of(tar_name: str) -> str:
    return tar_name.removesuffix(".tar")


def _sort_class(name: str, members: Iterable[Member], where: str) -> _Class:
    """Sort the images among a class's members. Hidden files are left out, as in a folder; no images are refused."""
    found = []
    for path, offset, length in members:
        image = _image_name(name, path, where)
        if image is not None:
            found.append((f"{name}/{image}", offset, length))
    if not found:
        raise UserError("a class tar holds no images", got=where, hint="remove it or fill it")
    found.sort()
    paths, offsets, lengths = zip(*found, strict=True)
    return _Class(list(paths), np.array(offsets, np.int64), np.array(lengths, np.int64))


def _image_name(class_name: str, path: str, where: str) -> str | None:
    parts = path.split("/")
    if len(parts) > 1:
        parts = [part for part in parts if part not in ("", ".")]
        if len(parts) == 2 and parts[0] == class_name:
            del parts[0]
    if len(parts) != 1 or parts[0] == "..":
        got, expected = f"{where}: {path!r}", f"NAME, or {class_name}/NAME"
        raise UserError(
            "a class tar's images lie in folders", got=got, expected=expected, hint="unpack it, or repack it"
        )
    if parts[0].lower().endswith(ARCHIVES):
        got, hint = f"{where}: {path!r}", "name a tar of class tars itself as SOURCE; unpack others"
        raise UserError("an archive in a class tar", got=got, hint=hint)
    return None if parts[0].startswith(".") else parts[0]


def _join(files: tuple[str, ...], numbers: Iterable[int], found: list[_Class]) -> tuple[list[str], Spans]:
    """Concatenate classes, of which the i-th lies in file `numbers[i]` of `files`."""
    if not found:
        raise UserError("an archive holds no class tars", got=files, expected="CLASS.tar for each class")
    file = np.repeat(np.fromiter(numbers, np.int32), [len(part.paths) for part in found])
    offset, length = (np.concatenate([part[column] for part in found]) for column in (1, 2))
    return [path for part in found for path in part.paths], Spans(files, file, offset, length)
