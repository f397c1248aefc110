"""The one error that a user can mend, and how the entry points show it.

A `UserError` says what is wrong, what was got, what is allowed and what cures it. Entry points print it as one
line and exit with 2, which tells launchers and batch scripts that a restart cannot help.
"""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """A mistake the user can mend: bad config, data or checkpoint. Every other exception is a bug or the machine.

    `UserError("unknown config key", got="optim.lrr", allowed="optim.lr", cure="write optim.lr")` reads
    "unknown config key: got optim.lrr; allowed: optim.lr; cure: write optim.lr".
    """

    def __init__(self, what: str, *, got: object = None, allowed: object = None, cure: str | None = None):
        parts = [what if got is None else f"{what}: got {got}"]
        if allowed is not None:
            parts.append(f"allowed: {allowed}")
        if cure is not None:
            parts.append(f"cure: {cure}")
        super().__init__("; ".join(parts))


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run an entry point and exit: 0 when it returns, 2 with one line on stderr for a `UserError`.

    Every rank of a job meets a bad config alike, so one of each node speaks: what is wrong may lie on one node
    alone. What a single rank meets (a damaged sample, say) is said by that rank.
    """
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if os.environ.get("LOCAL_RANK", "0") == "0" or getattr(error, "rank_local", False):
            where = "" if rank == "0" else f" (rank {rank})"
            print(f"error{where}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # Leave without running exit handlers: another rank may be inside a collective, and waiting for it would
        # turn a clear message into a hang. os._exit also spares the user torch's teardown warnings.
        os._exit(EXIT_USER_ERROR)
    sys.exit(0)
