"""Start and end the loader processes (workers). Importing this module loads neither torch nor timm."""

import atexit
import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

from gcvit.runtime import signals


def loader_context() -> ForkServerContext:
    """Return the context that starts workers; the first call starts their fork server without awaiting it.

    Fork would copy a process that runs threads of gloo, DeepSpeed and CUDA. A fork server is a fresh process, which
    imports what workers need once (some seconds), however many are then forked from it. If this is called early, the
    server imports while this process imports and builds. The server is not ended by a preemption signal, which SLURM
    sends to all processes of a job.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gcvit.data.loader"])
    for server in (resource_tracker, forkserver):
        with signals.block_signals():  # once for each: the tracker lets SIGTERM through again on its way
            server.ensure_running()
    return context


def start_worker(worker: int) -> None:
    """Set up the signals of a worker; the DataLoader calls this first in each.

    torch has already set one thread per worker.
    """
    # Ctrl-C reaches the whole process group. The main process ends its workers, so that they need not report it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # So does a preemption signal, which workers ignore: they load what the last steps need.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def exit_with_trainer() -> None:
        # torch's own watchdog polls the fork server, which lives as long as one of its children does.
        trainer.join()
        os._exit(1)

    def exit_on_sigterm() -> None:
        # A worker that does not stop by itself is ended by the trainer, with SIGTERM.
        while True:
            sent = signal.sigwaitinfo(signals.SIGNALS)
            if (sent.si_signo, sent.si_pid) == (signal.SIGTERM, trainer.pid):
                os._exit(1)

    for target in (exit_with_trainer, exit_on_sigterm):
        threading.Thread(target=target, daemon=True).start()


@atexit.register
def _end_loaders() -> None:
    """Kill the workers that are left when this process ends.

    The next exit handler, that of multiprocessing, sends SIGTERM, which may be lost beside pending signals of others,
    and then awaits them without a timeout.
    """
    for loader in multiprocessing.active_children():
        loader.kill()
