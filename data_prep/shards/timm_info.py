"""Writes `_info.json`, in which timm's `wds/` reader looks for the splits: `create_dataset("wds/", root=OUT)`."""

import json
from pathlib import Path
from typing import Any

from gcvit.data.manifest import FILE_NAME, read_manifest
from gcvit.errors import UserError
from gcvit.runtime.atomic_write import write_text

NAME = "_info.json"
ALIASES = {"val": "validation"}  # timm's own name for it, which its scripts ask for by default


def write_timm_info(out: Path) -> None:
    """Describe the split that is complete in `out`, or those in `out/train` and `out/val`; do nothing where none is.

    Other folders in `out` may be other data sets. Twice gives the same bytes. Errors: UserError for a malformed
    manifest, or where it cannot be written.
    """
    folders = [out] if (out / FILE_NAME).exists() else [out / name for name in ("train", "val")]
    splits: dict[str, dict[str, Any]] = {}
    for folder in folders:
        if not (folder / FILE_NAME).exists():
            continue
        manifest = read_manifest(folder, check_shards=False)
        split = {
            "name": manifest.split,
            "num_samples": manifest.num_samples,
            "filenames": [(folder.relative_to(out) / shard.name).as_posix() for shard in manifest.shards],
            "shard_lengths": [shard.num_samples for shard in manifest.shards],
        }
        for name in (manifest.split, ALIASES.get(manifest.split)):
            if name is not None:
                splits[name] = split | {"name": name}
    text = json.dumps({"splits": splits}, indent=1) + "\n"
    try:
        if splits and not ((out / NAME).exists() and (out / NAME).read_text() == text):
            write_text(out / NAME, text)
    except OSError as error:
        raise UserError("cannot write timm's list of shards", got=f"{out / NAME} ({error.strerror})") from None
