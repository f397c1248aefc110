"""Exit codes, and a report of how each process ended, which batch scripts read.

torchrun, srun and the deepspeed launcher replace every exit code by one of their own. So if the environment names a
folder in GCVIT_REPORT_DIR, every process writes `rank_N.json` there: its rank and host, its outcome, the reason and
the step.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

from gcvit.runtime import heartbeat
from gcvit.runtime.atomic_write import write_text

FINISHED = 0
CRASHED = 1
USER_ERROR = 2  # a restart cannot help
PREEMPTED = 75  # EX_TEMPFAIL: it has saved, and a restart resumes
HUNG = 76

_WORDS = {FINISHED: "finished", USER_ERROR: "user error", PREEMPTED: "preempted", HUNG: "hung"}


def describe_process() -> str:
    """Return the rank and host of this process, such as "rank 3 on node2"."""
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"


def write_report(code: int, what: str) -> None:
    """Write the report that this process ends with `code` because of `what`, or print why it cannot be written."""
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
        "time": time.time(),  # the first failure is the cause; other ranks fail because they lose the connection
    }
    path = Path(folder) / f"rank_{rank}.json"
    try:
        write_text(path, json.dumps(content) + "\n", durable=False)
    except OSError as error:
        print(f"cannot write {path}: {error.strerror}", file=sys.stderr, flush=True)
