"""Write a rank's file of a checkpoint in a process, so that hashing and fsync take no time of the trainer's GIL.

A trainer has one of these processes for the whole run. The process inherits the memory of the snapshot by a file
descriptor, reads a line of JSON for each file to write, and answers with lines of JSON. It never outlives the trainer:
the kernel kills it with its parent, and its input ends. It blocks the signals that are sent to the whole job, of
preemption or Ctrl-C, since the trainer answers them. The module imports the standard library alone, so that the process
starts in milliseconds and needs little memory.
"""

import ctypes
import json
import mmap
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gcvit.checkpoint.format import FileRecord, ReadBackError, write_file

_PR_SET_PDEATHSIG = 1
_BLOCKED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


class WriterError(RuntimeError):
    """Report that the process that writes the checkpoint has died, or has met a bug."""


class WriterProcess:
    """Control the process from the trainer. Create it in the main thread: the kernel ties its life to that thread."""

    def __init__(self, memory_fd: int):
        package = str(Path(__file__).parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-S", "-m", __name__, str(memory_fd), str(os.getpid())]
        # A child inherits the mask, so that no signal of the job can kill it before it is ready.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(memory_fd,),
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def pid(self) -> int:
        return self._process.pid

    def write(self, path: Path, header: bytes, num_bytes: int, on_progress: Callable[[], None]) -> FileRecord:
        """Write a file of this header and `num_bytes` bytes of the shared memory, as `write_file` does.

        Raises:
            OSError, ReadBackError: As in `write_file`.
            WriterError: The process has died, or has met a bug.
        """
        request = {"path": str(path), "header": header.hex(), "num_bytes": num_bytes}
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WriterError(self._describe_death()) from None
        for line in self._process.stdout:
            answer = json.loads(line)
            if "record" in answer:
                return dict(answer["record"])
            if "os_error" in answer:
                raise OSError(*answer["os_error"])
            if "mismatch" in answer:
                raise ReadBackError(Path(answer["mismatch"]))
            if "bug" in answer:
                raise WriterError(answer["bug"])
            on_progress()
        raise WriterError(self._describe_death())

    def close(self) -> None:
        """End the process after it has written the files that were requested."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            # Not by the end of its input, which loader processes that were forked from this one may hold open.
            self._process.stdin.write(b"\n")
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it has died
        self._process.wait()
        self._process.stdout.close()

    def _describe_death(self) -> str:
        return f"the process that writes checkpoints has ended with {self._process.wait()} (negative: a signal)"


def main(arguments: Sequence[str]) -> None:
    """Serve the requests of the parent until it sends an empty line or ends."""
    memory_fd, parent = map(int, arguments)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was asked
        return
    os.nice(5)  # the trainer and its loaders come first where cores are few
    for line in sys.stdin.buffer:
        if not line.strip():
            return
        request = json.loads(line)
        _answer(_write(request, memory_fd))


def _write(request: dict[str, Any], memory_fd: int) -> dict[str, Any]:
    num_bytes = request["num_bytes"]
    try:
        header = memoryview(bytes.fromhex(request["header"]))
        if not num_bytes:
            return {"record": write_file(Path(request["path"]), [header], _tell_progress)}
        memory = mmap.mmap(memory_fd, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        return {"record": write_file(Path(request["path"]), [header, memoryview(memory)], _tell_progress)}
    except OSError as error:
        return {"os_error": [error.errno, error.strerror, error.filename]}
    except ReadBackError as error:
        return {"mismatch": str(error.path)}
    except Exception:
        return {"bug": traceback.format_exc()}


def _tell_progress() -> None:
    _answer({})


def _answer(content: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
