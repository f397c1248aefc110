"""How a process ended: its exit code, and a report of it for batch scripts.

torchrun, srun and the deepspeed launcher turn every exit code into one of their own. So where the environment names a
folder in GCVIT_REPORT_DIR, every process leaves `rank_N.json` there: who it was, how it ended, why, at which step.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

from gcvit.runtime import heartbeat

FINISHED = 0
CRASHED = 1
USER_ERROR = 2  # a restart cannot mend it
PREEMPTED = 75  # EX_TEMPFAIL: saved, and a restart goes on
HUNG = 76

_WORDS = {FINISHED: "finished", USER_ERROR: "user error", PREEMPTED: "preempted", HUNG: "hung"}


def here() -> str:
    """This process in words: "rank 3 on node2"."""
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"


def report(code: int, what: str) -> None:
    """Leave the report that this process ends with `code`, because of `what`. Where it cannot be written, say so."""
    folder = os.environ.get("GCVIT_REPORT_DIR")
    if not folder:
        return
    rank = int(os.environ.get("RANK", 0))
    content = {
        "rank": rank,
        "host": socket.gethostname(),
        "outcome": _WORDS.get(code, "failed"),
        "exit": code,
        "what": " ".join(what.split()),
        "step": heartbeat.last_step(),
        "time": time.time(),  # the first to fail is the cause, the others' connections to it broke
    }
    path = Path(folder) / f"rank_{rank}.json"
    try:
        part = path.with_suffix(".tmp")
        part.write_text(json.dumps(content) + "\n")
        part.rename(path)
    except OSError as error:
        print(f"cannot write {path}: {error.strerror}", file=sys.stderr, flush=True)
