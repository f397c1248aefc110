"""Starts trainings quickly: torch is imported once, and each process of a training is forked from this one.

Its arguments are more modules to import. Reads a line of JSON from stdin for each training: {"ranks": N, "words":
[arguments of train.py], "log": FILE}, and where wanted "environment": {...}, "slow": {PLACE: seconds} and "fault":
{"kind": "hang" or "raise", "rank": R, "step": S}. PLACE is "step", "evaluate" or "write": the training tells of it in
its log, and takes so much longer for each. Answers with a line of its processes' ids, and with one of their exit codes
when all have ended (negative: the signal).
"""

import importlib
import json
import os
import socket
import sys
import time
from types import ModuleType

import train
from gcvit.checkpoint.writer_process import WriterProcess  # what train.py loads when it has read its arguments
from gcvit.evaluation import evaluator
from gcvit.runtime.entrypoint import run_main
from gcvit.training.trainer import Trainer

PLACES = {
    "step": (Trainer, "train_step"),
    "evaluate": (evaluator, "rank_of_label"),
    "write": (WriterProcess, "write"),
}


def become_rank(rank: int, request: dict, port: int) -> None:
    """Be one process of the training, as torchrun would start it."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["ranks"]}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, **request.get("environment", {})}
    os.environ.update({name: str(value) for name, value in place.items()})
    sys.argv = ["train.py", *request["words"]]
    for name, seconds in request.get("slow", {}).items():
        slow_down(*PLACES[name], name, seconds)
    fault = request.get("fault", {})
    if fault.get("rank") == rank:
        fail_at(fault["step"], fault["kind"])
    try:
        run_main(train.main)
    except SystemExit as end:
        os._exit(int(end.code or 0))  # the rest of the exit is this copy's of the worker, and takes seconds


def slow_down(owner: ModuleType | type, function: str, name: str, seconds: float) -> None:
    right = getattr(owner, function)

    def slow(*arguments, **options):
        print(f"now: {name}", flush=True)
        time.sleep(seconds)
        return right(*arguments, **options)

    setattr(owner, function, slow)


def fail_at(step: int, kind: str) -> None:
    right = Trainer.train_step

    def failing(trainer, batches):
        if trainer.state.step == step - 1:
            if kind == "raise":
                raise MemoryError("no room left")
            time.sleep(1000)
        return right(trainer, batches)

    Trainer.train_step = failing


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a module says when it is imported is no answer
    for module in sys.argv[1:]:
        importlib.import_module(module)
    for line in sys.stdin:
        request, port = json.loads(line), free_port()
        children = []
        for rank in range(request["ranks"]):
            child = os.fork()
            if child == 0:
                become_rank(rank, request, port)
            children.append(child)
        print(json.dumps(children), file=answers, flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), file=answers, flush=True)


if __name__ == "__main__":
    main()
