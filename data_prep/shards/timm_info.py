"""Write `_info.json`, from which timm's `wds/` reader learns the splits: `create_dataset("wds/", root=OUT)`."""

import json
from pathlib import Path
from typing import Any

from gcvit.data.manifest import FILE_NAME, read_manifest
from gcvit.errors import UserError
from gcvit.runtime.atomic_write import write_text

NAME = "_info.json"
ALIASES = {"val": "validation"}  # timm's name of it, the default of its scripts


def write_timm_info(out: Path) -> None:
    """Describe the split that is complete in `out`, or those in `out/train` and `out/val`; if none is, do nothing.

    Other folders in `out` may be other data sets. A second call gives the same bytes.

    Raises:
        UserError: A manifest is malformed, or the file cannot be written.
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
            _write(out / NAME, text)
    except OSError as error:
        raise UserError("cannot write timm's list of shards", got=f"{out / NAME} ({error.strerror})") from None


def _write(path: Path, text: str) -> None:
    """Write the file, again if a process that completes the same shards removes the temporary file meanwhile."""
    for is_last in (False, False, True):
        try:
            return write_text(path, text)
        except FileNotFoundError:
            if is_last or not path.parent.is_dir():
                raise
