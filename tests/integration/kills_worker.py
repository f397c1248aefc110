"""Starts trainings quickly: torch is imported once, and each process of a training is forked from this one.

Reads a line of JSON from stdin for each training: {"ranks": N, "words": [arguments of train.py], "log": FILE}. Answers
with a line of its processes' ids, and with one of their exit codes when all have ended (negative: the signal).
"""

import json
import os
import socket
import sys

import train
from gcvit import run, trainer  # noqa: F401  (what train.py loads when it has read its arguments)
from gcvit.errors import run_main


def become_rank(rank: int, request: dict, port: int) -> None:
    """Be one process of the training, as torchrun would start it."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["ranks"]}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    sys.argv = ["train.py", *request["words"]]
    try:
        run_main(train.main)
    except SystemExit as end:
        os._exit(int(end.code or 0))  # the rest of the exit is this copy's of the worker, and takes seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def main() -> None:
    for line in sys.stdin:
        request, port = json.loads(line), free_port()
        children = []
        for rank in range(request["ranks"]):
            child = os.fork()
            if child == 0:
                become_rank(rank, request, port)
            children.append(child)
        print(json.dumps(children), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


if __name__ == "__main__":
    main()
