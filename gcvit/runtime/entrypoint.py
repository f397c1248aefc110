"""How an entry point ends: its exit code, and one line on stderr for an error that the user can mend."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from gcvit.errors import Preempted, UserError
from gcvit.runtime.exit_status import CRASHED, FINISHED, PREEMPTED, USER_ERROR, here, report


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run an entry point and exit: 0 when it returns, 2 with one line on stderr for a `UserError`, 75 if `Preempted`.
    A `UserError` that may pass exits with 1.

    Every rank of a job meets a bad config alike, so one of each node speaks: what is wrong may lie on one node
    alone. What a single rank meets (a corrupt sample, say) is said by that rank.
    """
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        line = " ".join(str(error).split())
        if os.environ.get("LOCAL_RANK", "0") == "0" or getattr(error, "rank_local", False):
            where = "" if rank == "0" else f" (rank {rank})"
            print(f"error{where}: {line}", file=sys.stderr, flush=True)
        _leave(CRASHED if error.may_pass else USER_ERROR, line)
    except Preempted as error:
        _leave(PREEMPTED, str(error))
    except SystemExit as end:  # argparse's way to refuse a command line
        code = end.code if isinstance(end.code, int) else FINISHED if end.code is None else CRASHED
        report(code, f"exit with {end.code}")
        raise
    except BaseException as error:
        what = traceback.format_exception_only(error)[-1].strip()
        if isinstance(error, KeyboardInterrupt) or int(os.environ.get("WORLD_SIZE", 1)) == 1:
            report(CRASHED, what)
            raise
        traceback.print_exc()
        print(f"failed ({here()}): {what}", file=sys.stderr, flush=True)
        _leave(CRASHED, what)
    report(FINISHED, "")
    sys.exit(FINISHED)


def _leave(code: int, what: str) -> NoReturn:
    """Exit without running exit handlers.

    Another rank may be inside a collective, and waiting for it would turn a clear message into a hang. It also spares
    the user torch's teardown warnings.
    """
    report(code, what)
    sys.stdout.flush()
    os._exit(code)
