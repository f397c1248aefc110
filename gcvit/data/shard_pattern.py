"""Shards named with braces, as in webdataset: `https://HOST/train-{000000..000146}.tar`.

A pattern names the shards of one split. Samples are still found by the manifest beside the shards, so that the names
only have to agree with it.
"""

import posixpath
from collections.abc import Iterable
from dataclasses import dataclass

from braceexpand import braceexpand

from gcvit.data.download import is_remote, redact
from gcvit.errors import UserError

_SPLITS = ("train", "val")


@dataclass(frozen=True)
class ShardPattern:
    """The folder and the shards that a pattern names.

    `data_dir` is the folder to open. If the shards lie in a folder named after a split, it is the folder above, which
    has the other split too, and `split` is the one that is named. Otherwise `split` is None.
    """

    data_dir: str
    split: str | None
    names: frozenset[str]

    def check_shards(self, names: Iterable[str]) -> None:
        """Check that the pattern names exactly the shards of a manifest.

        Args:
            names: Shard names of the manifest.

        Raises:
            UserError: The names differ.
        """
        listed = frozenset(names)
        if differing := self.names ^ listed:
            first = min(differing)
            where = "only in the pattern" if first in self.names else "only in the manifest"
            raise UserError(
                "the pattern of shards disagrees with the manifest",
                got=f"{len(self.names)} shards, {len(differing)} names differ: {first} is {where}",
                expected=f"the {len(listed)} shards of {redact(self.data_dir)}",
                hint="correct the range, or give the folder without shard names",
            )


def parse_pattern(data_dir: str) -> ShardPattern | None:
    """Parse `data_dir` as a pattern of shards; None if it names a folder, that is, has no braces before `.tar`.

    Raises:
        UserError: the braces are unbalanced, or the shards lie in several folders.
    """
    path, query = data_dir, ""
    if is_remote(data_dir):
        path, mark, query = data_dir.partition("?")
        query = mark + query
    if "{" not in path or not path.endswith(".tar"):
        return None
    try:
        shards = list(braceexpand(path))
    except ValueError:
        raise UserError("unbalanced braces in a pattern of shards", got=redact(data_dir)) from None
    folders = {posixpath.dirname(shard) for shard in shards}
    if len(folders) > 1:
        hint = "give the folder that holds train/ and val/"
        raise UserError("a pattern of shards in several folders", got=redact(data_dir), expected="one", hint=hint)
    (folder,) = folders
    split = posixpath.basename(folder)
    if split in _SPLITS:
        folder = posixpath.dirname(folder)
    names = frozenset(map(posixpath.basename, shards))
    return ShardPattern((folder or ".") + query, split if split in _SPLITS else None, names)
