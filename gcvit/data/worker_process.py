"""Where loader processes come from. Importing this module loads neither torch nor timm."""

import atexit
import multiprocessing
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

from gcvit.runtime import signals


def loader_context() -> ForkServerContext:
    """How loader processes are started; the first call starts, and does not await, their server.

    Fork would copy a process that runs threads of gloo, DeepSpeed and CUDA. A fork server is a fresh one, which
    imports what loaders need once (some seconds), however many are then forked from it. Called early, it does that
    while this process imports and builds its own. A notice to leave, which SLURM gives to all processes of a job, does
    not reach these.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gcvit.data.loader"])
    for server in (resource_tracker, forkserver):
        with signals.block_signals():  # once for each: the tracker lets SIGTERM through again on its way
            server.ensure_running()
    return context


@atexit.register
def _end_loaders() -> None:
    """What is left of them at this process's end. multiprocessing, whose turn is next, asks them by a SIGTERM that is
    lost among the notices of others, and awaits them for ever."""
    for loader in multiprocessing.active_children():
        loader.kill()
