"""The folder of a run: `runs/TAG` with config.yaml, checkpoints/, metrics and a lock against a second writer."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gcvit import checkpoint
from gcvit.config import Config
from gcvit.config_file import dump_config
from gcvit.errors import UserError


def checkpoints_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run's lock while inside. The system frees it when the process ends, however it ends.

    Errors: UserError where a live run holds it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / "lock", "a+")  # noqa: SIM115  (closed below; closing frees the lock)
    except OSError as error:
        raise UserError(
            "cannot write the run folder", got=f"{run_dir} ({error.strerror})", cure="set output_dir"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                "the run folder is in use by a live run",
                got=f"{run_dir}, held by {file.read().strip() or 'a run that is just starting'}",
                cure="wait for it, stop it, or choose another --tag",
            ) from None
        except OSError as error:
            raise UserError(
                "the file system of the run folder has no locks",
                got=f"{run_dir} ({error.strerror})",
                cure="mount it with flock, or set output_dir to one that has them",
            ) from None
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.ctime()}))
        file.flush()
        yield


def choose_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """What `--resume auto|none|PATH` means: the checkpoint to go on from, or None for a fresh start.

    Errors: UserError for a fresh start over an old run, or a path that holds no checkpoint.
    """
    newest = checkpoint.latest(checkpoints_of(run_dir))
    if resume == "auto":
        return newest
    if resume == "none":
        if newest is not None:
            raise UserError(
                "the run folder holds a run already",
                got=newest,
                cure="go on with --resume auto, choose another --tag, or move the folder away",
            )
        return None
    chosen = find_checkpoint(Path(resume))
    if newest is not None and chosen.resolve() != newest.resolve():
        raise UserError(
            "the run folder has checkpoints of its own, which would mix with the one to go on from",
            got=chosen,
            allowed=newest,
            cure="choose another --tag for the new branch, or move those away",
        )
    return chosen


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path names: itself, or of a run folder the best one, else the newest.

    Errors: UserError where there is none.
    """
    if (path / checkpoint.STATE_FILE).exists():
        return path
    newest = checkpoint.latest(checkpoints_of(path))
    if newest is None:
        raise UserError(
            "no checkpoint here",
            got=path,
            allowed="a run folder (runs/TAG) or a checkpoint (runs/TAG/checkpoints/step_N)",
            cure="check the path, or wait for the run's first save",
        )
    best_step = checkpoint.open_checkpoint(newest).state.best_step
    best = newest.with_name(f"step_{best_step:08d}")
    return best if best.exists() else newest


def write_config(config: Config) -> None:
    """Leave the resolved config beside the run."""
    (config.run_dir / "config.yaml").write_text(dump_config(config))
