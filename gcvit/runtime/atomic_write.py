"""Write a file whole or not at all: under a temporary name, then a rename."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def temporary_path(path: Path) -> Path:
    """Return a name beside `path` that no other process uses, to write to before a rename."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary name to write to, and rename it to `path` at the end; after an error nothing remains.

    Args:
        path: File to write; an existing one is replaced.
        durable: Flush the content to disk before the rename, so that the name never survives a power cut without it.

    Raises:
        OSError: Flushing or renaming fails.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        if durable:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, errors: str = "strict", durable: bool = True) -> None:
    """Write a UTF-8 text file whole or not at all, like `atomic_path`."""
    with atomic_path(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)
