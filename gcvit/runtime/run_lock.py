"""Lock a run folder: one process writes at a time, and a restart takes over the lock of a dead process.

The operating system's lock on the file `lock` comes first: it ends with its process. On some file systems it survives
a node that lost its power, or does not hold between nodes. So the file names its holder and the time of the last
heartbeat. A process that takes the lock over renames a new file over the old one. A holder that was only cut off
reads there that it has lost the lock, and stops writing.
"""

import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from gcvit.errors import UserError

_BEAT_SECONDS = 5.0
_WATCH_SECONDS = 12.0  # a live holder beats within this time, whatever the difference of two clocks
_DEAD_SECONDS = 60.0  # since the last beat


@dataclass(frozen=True)
class Holder:
    """Identify the process that holds a lock."""

    job: str | None  # of SLURM
    restart: int  # how often SLURM has requeued it
    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        job = "" if self.job is None else f"job {self.job}, restart {self.restart}, "
        return f"{job}process {self.pid} on {self.host} since {self.since}"


class RunLock:
    """Hold the lock of a run folder while the block runs. The system frees it whenever and however the process ends."""

    def __init__(self, run_dir: Path):
        self._run_dir, self._path = run_dir, run_dir / "lock"
        self.holder = Holder(
            os.environ.get("SLURM_JOB_ID"),
            int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            socket.gethostname(),
            os.getpid(),
            time.ctime(),
        )
        self._is_over = threading.Event()

    def __enter__(self) -> Self:
        """Acquire the lock, and start its heartbeat.

        Raises:
            UserError: if a live run holds the lock, or the folder cannot be written.
        """
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._file = self._acquire()
        except OSError as error:
            got = f"{self._run_dir} ({error.strerror})"
            raise UserError("cannot write the run folder", got=got, hint="set output_dir") from None
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, place: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        with suppress(OSError):
            self._file.truncate(0)  # so that no other node waits for the next beat
        self._file.close()

    def check(self) -> None:
        """Check that this process still holds the lock.

        Raises:
            UserError: if another run has taken the lock over.
            OSError: if the file cannot be read.
        """
        holder, _ = _read(self._path)
        if holder is not None and holder != self.holder:
            raise UserError(
                "another run has taken this run's folder over",
                got=f"{self._run_dir}, now held by {holder}",
                hint="do nothing: that run continues; this one wrote no heartbeat for too long",
            )

    def _acquire(self) -> IO[bytes]:
        while True:
            file = _open(self._path)  # closing it frees the lock
            if not _lock(file, self._run_dir):
                file.close()
                return self._take_over()
            if not _is_at(file, self._path):  # another process has renamed a new file over it
                file.close()
                continue
            holder, _ = _read(self._path)
            if holder and holder.host != self.holder.host and not self._follows(holder) and self._sees_beat(holder):
                file.close()
                raise self._refusal(holder)
            self._sign(file)
            return file

    def _take_over(self) -> IO[bytes]:
        """Acquire a lock that the system reports as held, if it is a dead node's."""
        holder, beat = _read(self._path)
        if holder is None:
            raise self._refusal("a run that is just starting")
        if not self._follows(holder) and (time.time() - beat <= _DEAD_SECONDS or self._sees_beat(holder)):
            raise self._refusal(holder)
        part = self._path.with_name(f"lock.{self.holder.host}.{self.holder.pid}")
        file = _open(part)
        _lock(file, self._run_dir)
        self._sign(file)
        part.rename(self._path)
        return file

    def _follows(self, holder: Holder) -> bool:
        """Return whether `holder` is an earlier start of the same job, which SLURM has ended."""
        mine = self.holder
        return mine.job is not None and mine.job == holder.job and mine.restart > holder.restart

    def _sees_beat(self, holder: Holder) -> bool:
        before, end = _read(self._path), time.monotonic() + _WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(_WATCH_SECONDS / 50)
            if _read(self._path) != before:
                return True
        return False

    def _refusal(self, holder: object) -> UserError:
        return UserError(
            "the run folder is in use by a live run",
            got=f"{self._run_dir}, held by {holder}",
            hint="wait for it, stop it, or choose another --tag",
        )

    def _sign(self, file: IO[bytes]) -> None:
        # One write of a constant length: a reader never sees half of it.
        content = json.dumps({**asdict(self.holder), "heartbeat": int(time.time())}).encode()
        file.truncate(len(content))
        os.pwrite(file.fileno(), content, 0)
        os.fsync(file.fileno())

    def _beat(self) -> None:
        while not self._is_over.wait(_BEAT_SECONDS):
            with suppress(OSError):  # the disk is full: the system's lock still holds
                self._sign(self._file)


def _open(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)


def _lock(file: IO[bytes], run_dir: Path) -> bool:
    """Lock the file for this process, and return whether that succeeded.

    Raises:
        UserError: if the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            "the file system of the run folder has no locks",
            got=f"{run_dir} ({error.strerror})",
            hint="mount it with flock, or set output_dir to one that has them",
        ) from None
    return True


def _is_at(file: IO[bytes], path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _read(path: Path) -> tuple[Holder | None, float]:
    """Read the holder of a lock and the time of its last heartbeat; (None, 0.0) if nobody has signed it."""
    try:
        content = json.loads(path.read_bytes())
        return Holder(**{name: content[name] for name in Holder.__annotations__}), float(content["heartbeat"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # nobody has signed it, or somebody is about to
        return None, 0.0
