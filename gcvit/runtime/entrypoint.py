"""Run an entry point, and turn its errors into exit codes and one line on stderr."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from gcvit.errors import Preempted, UserError
from gcvit.runtime.exit_status import CRASHED, FINISHED, PREEMPTED, USER_ERROR, describe_process, write_report


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run an entry point and exit: 0 if it returns, 2 with one line on stderr for a `UserError`, 75 if `Preempted`.

    A `UserError` that may pass exits with 1. All ranks fail alike on a bad config, so the first rank of each node
    prints the line: the cause may be on one node alone. A rank whose error is `rank_local`, a corrupt sample for
    example, prints its own.
    """
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        line = " ".join(str(error).split())
        if os.environ.get("LOCAL_RANK", "0") == "0" or getattr(error, "rank_local", False):
            where = "" if rank == "0" else f" (rank {rank})"
            print(f"error{where}: {line}", file=sys.stderr, flush=True)
        _exit_now(CRASHED if error.may_pass else USER_ERROR, line)
    except Preempted as error:
        _exit_now(PREEMPTED, str(error))
    except SystemExit as end:  # argparse's way to refuse a command line
        code = end.code if isinstance(end.code, int) else FINISHED if end.code is None else CRASHED
        write_report(code, f"exit with {end.code}")
        raise
    except BaseException as error:
        what = traceback.format_exception_only(error)[-1].strip()
        if isinstance(error, KeyboardInterrupt) or int(os.environ.get("WORLD_SIZE", 1)) == 1:
            write_report(CRASHED, what)
            raise
        traceback.print_exc()
        print(f"failed ({describe_process()}): {what}", file=sys.stderr, flush=True)
        _exit_now(CRASHED, what)
    write_report(FINISHED, "")
    sys.exit(FINISHED)


def _exit_now(code: int, what: str) -> NoReturn:
    """Exit without running exit handlers.

    Another rank may be inside a collective. Waiting for it would turn a clear message into a hang. The user does not
    see PyTorch's teardown warnings either.
    """
    write_report(code, what)
    sys.stdout.flush()
    os._exit(code)
