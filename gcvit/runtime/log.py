"""Configure logging: level, rank and time on each line; rank 0 on the screen, every rank in a file of its own.

Modules log with `logging.getLogger(__name__)`; where nothing is configured, only warnings reach the screen.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gcvit.errors import Preempted, UserError

LOGGER = logging.getLogger("gcvit")


@contextmanager
def log_to(folder: Path | None, rank: int) -> Iterator[None]:
    """Log to stderr (rank 0 only) and to FOLDER/rank_<rank>.log inside the block.

    The file keeps the lines of earlier starts. An error that ends the block is logged to the file alone.

    Args:
        folder: Folder of the log file; if None, no file is written.

    Raises:
        UserError: The file cannot be written.
    """
    screen = logging.StreamHandler(sys.stderr) if rank == 0 else logging.NullHandler()
    handlers: list[logging.Handler] = [screen]
    if folder is not None:
        handlers.append(_open_file(folder / f"rank_{rank:05d}.log"))
    formatter = logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s: %(message)s")
    for handler in handlers:
        handler.setFormatter(formatter)
        LOGGER.addHandler(handler)
    before = LOGGER.level, LOGGER.propagate
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # a library may have given the root logger a handler, which would repeat each line
    try:
        yield
    except BaseException as error:
        if folder is not None:
            LOGGER.removeHandler(screen)  # the entry point shows the error there
            LOGGER.error(error, exc_info=not isinstance(error, UserError | Preempted))
        raise
    finally:
        LOGGER.setLevel(before[0])
        LOGGER.propagate = before[1]
        for handler in handlers:
            LOGGER.removeHandler(handler)
            handler.close()


def _open_file(path: Path) -> logging.FileHandler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return logging.FileHandler(path)
    except OSError as error:
        got = f"{path} ({error.strerror})"
        refusal = UserError("cannot write the log", got=got, hint="make room, or set output_dir")
        refusal.rank_local = True  # type: ignore[attr-defined]  # other ranks write other files
        raise refusal from None
