"""End a process that hangs, with the stacks of all its threads in the log."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from gcvit.runtime import exit_status, heartbeat

_PATIENCE_BEFORE_FIRST_STEP = 4  # times the limit: compilation, first reads
_SECONDS_TO_REPORT = 20


@contextmanager
def watchdog(seconds: float | None) -> Iterator[None]:
    """End this process if it makes no progress for `seconds` while the block runs; None disables it.

    The process prints its stacks, writes its report and exits with 76. Ranks that wait for a hanging rank make no
    progress either, so all of them print where they are.
    """
    if seconds is None:
        yield
        return
    is_over = threading.Event()
    thread = threading.Thread(target=_watch, args=(seconds, is_over), name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _watch(seconds: float, is_over: threading.Event) -> None:
    tick = min(seconds / 20, 10.0)
    idle, seen, before = 0.0, heartbeat.num_marks(), time.monotonic()
    while not is_over.wait(tick):
        now = time.monotonic()
        idle += min(now - before, 2 * tick)  # a stopped process does not hang; this thread was stopped with it
        before = now
        if heartbeat.num_marks() != seen:
            idle, seen = 0.0, heartbeat.num_marks()
        limit = seconds if heartbeat.last_step() is not None else _PATIENCE_BEFORE_FIRST_STEP * seconds
        if idle >= limit and not _is_debugged():
            _end(idle, 2 * tick)


def _is_debugged() -> bool:
    """Return whether the main thread runs in pdb, where a person may be at the prompt."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame:
        if frame.f_globals.get("__name__") == "bdb":
            return True
        frame = frame.f_back
    return False


def _end(idle: float, pause: float) -> None:
    # A dead file system, for example, may block the report too. Then faulthandler ends the process, with 1.
    faulthandler.dump_traceback_later(_SECONDS_TO_REPORT + pause, exit=True)
    step = heartbeat.last_step()
    what = f"no progress for {idle:.0f} s " + ("before the first step" if step is None else f"after step {step}")
    lines = [f"hung: {what}; the stacks of all threads:", *_read_stacks().splitlines()]
    with open(2, "wb", closefd=False) as stderr:  # in one piece, and without a lock that another thread may hold
        stderr.write("".join(f"[{exit_status.describe_process()}] {line}\n" for line in lines).encode())
    exit_status.write_report(exit_status.HUNG, what)
    time.sleep(pause)  # a launcher ends the other ranks after this one: let them print theirs
    os._exit(exit_status.HUNG)


def _read_stacks() -> str:
    with os.fdopen(os.memfd_create("stacks"), "w+", errors="replace") as memory:
        faulthandler.dump_traceback(memory, all_threads=True)
        memory.seek(0)
        return memory.read()
