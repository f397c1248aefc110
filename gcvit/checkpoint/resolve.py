"""The folder of a run: `runs/TAG` with config.yaml, checkpoints/, metrics and a lock (`run_lock.py`)."""

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
    """What `--resume auto|none|PATH` means: the checkpoint to go on from, or None for a fresh start.

    Whether it is sound is asked by `open_latest_valid`.

    Errors: UserError for a fresh start over an old run, or a path that holds no checkpoint.
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
    """The checkpoint to go on from, checked to the last byte, and the newer ones that are corrupt; all ranks together.

    Only with "auto" are corrupt ones passed over. Errors, on all ranks alike: as `choose_checkpoint`, and UserError
    naming the corrupt file of the newest where none is sound.
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
    """Rename corrupt checkpoints to `step_N.corrupt`, so that the run can save these steps again; by one rank.

    Returns what the user must hear. Errors: UserError.
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
    """The checkpoint that a path names: itself, or of a run folder the best one, else the newest.

    Errors: UserError where there is none.
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
    """Leave the resolved config beside the run. Errors: UserError; a config that is there is then left as it was."""
    path = config.run_dir / "config.yaml"
    part = path.with_name("config.yaml.tmp")
    try:
        part.write_text(dump_config(config))
        part.replace(path)  # it may be what this run was started from
    except OSError as error:
        raise UserError(
            "cannot write the run folder", got=f"{path} ({error.strerror})", hint="make room, or set output_dir"
        ) from None
