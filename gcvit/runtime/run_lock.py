"""The lock of a run's folder: one writer at a time, and how a dead one's is taken over.

The system's lock on the file `lock` comes first: it is gone when its process is. Two things it cannot do on every file
system: let go of the lock of a node that lost its power, and hold between nodes at all. So the file says who holds it,
with the time of its last heartbeat, and whoever takes it over renames a new file over the old: a holder that was only
cut off reads there that it was outbid, and writes no more.
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
_WATCH_SECONDS = 12.0  # in which a live holder is seen to beat, whatever the clocks of two nodes say
_DEAD_SECONDS = 60.0  # since the last beat


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    job: str | None  # of SLURM
    restart: int  # how often SLURM has requeued it
    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        job = "" if self.job is None else f"job {self.job}, restart {self.restart}, "
        return f"{job}process {self.pid} on {self.host} since {self.since}"


class RunLock:
    """Held while inside, by one process. The system frees it when that process ends, however it ends."""

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
        """Errors: UserError where a live run holds it, or the folder cannot be written."""
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
            self._file.truncate(0)  # so that nobody on another node waits for a next beat
        self._file.close()

    def check(self) -> None:
        """Errors: UserError where another run has taken the lock over; OSError where the file cannot be read."""
        holder, _ = _read(self._path)
        if holder is not None and holder != self.holder:
            raise UserError(
                "another run has taken this run's folder over",
                got=f"{self._run_dir}, now held by {holder}",
                hint="nothing: that one goes on; this one was too long without a sign of life",
            )

    def _acquire(self) -> IO[bytes]:
        while True:
            file = _open(self._path)  # closed in the end; closing frees the lock
            if not _lock(file, self._run_dir):
                file.close()
                return self._take_over()
            if not _is_at(file, self._path):  # it was renamed over meanwhile
                file.close()
                continue
            holder, _ = _read(self._path)
            if holder and holder.host != self.holder.host and not self._follows(holder) and self._sees_beat(holder):
                file.close()
                raise self._refusal(holder)
            self._sign(file)
            return file

    def _take_over(self) -> IO[bytes]:
        """The system says that it is locked, which may be the lock of a dead node."""
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
        """Whether that is an earlier start of the same job, which SLURM has ended."""
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
        # Always of one length and in one piece, so that a reader finds no half.
        content = json.dumps({**asdict(self.holder), "heartbeat": int(time.time())}).encode()
        file.truncate(len(content))
        os.pwrite(file.fileno(), content, 0)
        os.fsync(file.fileno())

    def _beat(self) -> None:
        while not self._is_over.wait(_BEAT_SECONDS):
            with suppress(OSError):  # a full disk: the lock of the system still holds
                self._sign(self._file)


def _open(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)


def _lock(file: IO[bytes], run_dir: Path) -> bool:
    """Whether the file is locked for this process now. Errors: UserError where there are no locks."""
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
    """Who has signed the lock, and the time of the last heartbeat; nobody where it is empty. Errors: OSError."""
    try:
        content = json.loads(path.read_bytes())
        return Holder(**{name: content[name] for name in Holder.__annotations__}), float(content["heartbeat"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # signed by nobody, or being signed
        return None, 0.0
