"""The errors that end a run on purpose.

A `UserError` says what is wrong, what was got, what was expected and a hint. Entry points print it as one
line and exit with 2 (`runtime/entrypoint.py`), which tells launchers and batch scripts that a restart cannot help.
"""

import errno
import sys

_PASSING = (errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO)


class UserError(ValueError):
    """A mistake the user can mend: bad config, data or checkpoint. Every other exception is a bug or the machine.

    `UserError("unknown config key", got="optim.lrr", expected="optim.lr", hint="write optim.lr")` reads
    "unknown config key: got optim.lrr; expected: optim.lr; hint: write optim.lr".

    `may_pass`: it came of an error that a file system on a network has and loses by itself, so that a restart may help.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, hint: str | None = None):
        parts = [what if got is None else f"{what}: got {got}"]
        if expected is not None:
            parts.append(f"expected: {expected}")
        if hint is not None:
            parts.append(f"hint: {hint}")
        super().__init__("; ".join(parts))
        cause = sys.exception()
        self.may_pass = isinstance(cause, OSError) and cause.errno in _PASSING


class Preempted(Exception):
    """The run leaves before its end, because it was told to; all ranks alike. A restart goes on."""

    def __init__(self) -> None:
        super().__init__("preempted by SIGUSR1 or SIGTERM")
