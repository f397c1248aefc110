"""Where loader processes come from. Importing this module loads neither torch nor timm."""

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext


def loader_context() -> ForkServerContext:
    """How loader processes are started; the first call starts, and does not await, their server.

    Fork would copy a process that runs threads of gloo, DeepSpeed and CUDA. A fork server is a fresh one, which
    imports what loaders need once (some seconds), however many are then forked from it. Called early, it does that
    while this process imports and builds its own.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gcvit.data.stream"])
    forkserver.ensure_running()
    return context
