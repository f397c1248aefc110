"""Find checkpoints in a run's folder. `runs/TAG` has config.yaml, checkpoints/, metrics and a lock (`run_lock.py`)."""

from collections.abc import Iterable
from pathlib import Path

from gcvit.checkpoint import store
from gcvit.checkpoint.format import STATE_FILE, step_dir
from gcvit.checkpoint.store import Checkpoint, CorruptCheckpointError
from gcvit.config.load import dump_config
from gcvit.config.schema import Config
from gcvit.errors import UserError
from gcvit.runtime.distributed import World


def checkpoints_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def choose_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """Choose the checkpoint that `--resume auto|none|PATH` names; `open_latest_valid` checks its content.

    Returns:
        The checkpoint to resume from, or None for a fresh start.

    Raises:
        UserError: The folder has a run that a fresh start or another checkpoint would mix with, or the path holds none.
    """
    newest = store.latest(checkpoints_of(run_dir))
    if resume == "auto":
        return newest
    if resume == "none":
        if newest is not None:
            raise UserError(
                "the run folder holds a run already",
                got=newest,
                hint="go on with --resume auto, choose another --tag, or move the folder away",
            )
        return None
    chosen = find_checkpoint(Path(resume))
    if newest is not None and chosen.resolve() != newest.resolve():
        raise UserError(
            "the run folder has checkpoints of its own, which would mix with the one to go on from",
            got=chosen,
            expected=newest,
            hint="choose another --tag for the new branch, or move those away",
        )
    return chosen


def open_latest_valid(
    run_dir: Path, resume: str, world: World
) -> tuple[Checkpoint | None, list[CorruptCheckpointError]]:
    """Open the checkpoint to resume from and check it to the last byte, by all ranks together.

    Only with "auto" are corrupt checkpoints skipped.

    Returns:
        The checkpoint, or None for a fresh start; and the errors of the newer checkpoints, which are corrupt.

    Raises:
        UserError: As in `choose_checkpoint`; raised on all ranks.
        CorruptCheckpointError: No checkpoint is valid; raised on all ranks, with the corrupt file of the newest.
    """
    chosen = world.on_rank0(lambda: choose_checkpoint(run_dir, resume))
    if chosen is None:
        return None, []
    paths = [chosen] if resume != "auto" else world.on_rank0(lambda: store.list_checkpoints(chosen.parent)[::-1])
    corrupt: list[CorruptCheckpointError] = []
    for path in paths:
        try:
            found = world.on_rank0(lambda path=path: store.open_checkpoint(path))  # type: ignore[misc]
            return store.check(found, world), corrupt
        except CorruptCheckpointError as error:
            corrupt.append(error)
    raise corrupt[0]


def quarantine(corrupt: Iterable[CorruptCheckpointError]) -> list[str]:
    """Rename corrupt checkpoints to `step_N.corrupt`, so that the run can save these steps again. Called by one rank.

    Returns:
        Messages for the user.

    Raises:
        UserError: A checkpoint cannot be renamed.
    """
    notices = []
    for error in corrupt:
        folder = error.path.parent
        places = (folder.with_name(f"{folder.name}.corrupt{suffix}") for suffix in ("", *map(str, range(2, 1000))))
        place = next(path for path in places if not path.exists())
        try:
            folder.rename(place)
        except OSError as failure:
            got = f"{folder} ({failure.strerror})"
            raise UserError("cannot rename a corrupt checkpoint", got=got, hint="move it away") from None
        notices.append(str(error))
        notices.append(f"the one before is taken instead; the corrupt one is kept as {place}")
    return notices


def find_checkpoint(path: Path) -> Path:
    """Find the checkpoint that a path names: a checkpoint itself, or the best one of a run folder, else its newest.

    Raises:
        UserError: The path has no checkpoint.
    """
    if (path / STATE_FILE).exists():
        return path
    newest = store.latest(checkpoints_of(path))
    if newest is None:
        raise UserError(
            "no checkpoint here",
            got=path,
            expected="a run folder (runs/TAG) or a checkpoint (runs/TAG/checkpoints/step_N)",
            hint="check the path, or wait for the run's first save",
        )
    best_step = store.open_checkpoint(newest).state.best_step
    best = newest.with_name(step_dir(best_step))
    return best if best.exists() else newest


def write_config(config: Config) -> None:
    """Write the resolved config to the run folder.

    Raises:
        UserError: The file cannot be written; an older config then stays as it was.
    """
    path = config.run_dir / "config.yaml"
    part = path.with_name("config.yaml.tmp")
    try:
        part.write_text(dump_config(config))
        part.replace(path)  # it may be what this run was started from
    except OSError as error:
        raise UserError(
            "cannot write the run folder", got=f"{path} ({error.strerror})", hint="make room, or set output_dir"
        ) from None
