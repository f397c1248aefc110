"""Read the names of the classes in the order of their labels (`--classes`), from a file or from timm's lists."""

import importlib.util
from pathlib import Path

from gcvit.errors import UserError


def read_class_map(path: Path) -> tuple[str, ...]:
    """Read the classes that a text file lists, one a line; the first has label 0.

    A line begins with the name of a class folder, such as a WordNet id. The name ends at the first tab or, if there is
    none, at the first blank; the rest is a comment. Blank lines do not count.

    Args:
        path: Text file; or one of timm's lists of synsets by name, such as `imagenet` or `imagenet22k`.

    Raises:
        UserError: The file is unreadable or empty, or lists a class twice.
    """
    if not path.exists() and path.name == str(path):
        path = _find_timm_list(path.name)
    try:
        # Names of folders need not be UTF-8; this decodes those that are not as os.fsdecode does.
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError("cannot read the class map", got=f"{path} ({error.strerror})") from None
    lines = [line for line in text.split("\n") if line.strip()]
    classes = [line.partition("\t")[0].strip() if "\t" in line else line.split()[0] for line in lines]
    if not classes:
        raise UserError("the class map is empty", got=path, expected="the name of a class folder a line")
    if wrong := [name for name in classes if name.startswith(".") or "/" in name or not name]:
        got = f"{wrong[0]!r} in {path}"
        raise UserError("no class folder can be called this", got=got, expected="a name without slash or first dot")
    line_of: dict[str, int] = {}
    for number, name in enumerate(classes):
        if line_of.setdefault(name, number) != number:
            got = f"{name} on lines {line_of[name] + 1} and {number + 1} of {path}"
            hint = "remove one; a name that holds blanks ends at a tab"
            raise UserError("the class map names a class twice", got=got, hint=hint)
    return tuple(classes)


def _find_timm_list(name: str) -> Path:
    # Not by an import, which would load torch.
    spec = importlib.util.find_spec("timm")
    folders = list(spec.submodule_search_locations or []) if spec else []
    lists = {
        path.name.removesuffix("_synsets.txt"): path
        for folder in folders
        for path in Path(folder, "data/_info").glob("*_synsets.txt")
    }
    if name not in lists:
        raise UserError(
            "no such class map",
            got=f"--classes {name}",
            expected=f"a text file, or of timm's: {', '.join(sorted(lists)) or 'none, since timm is not installed'}",
        )
    return lists[name]
