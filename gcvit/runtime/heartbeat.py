"""Signs of life of this process: what it has got done, for its watchdog and for the report of its end."""

_num_marks = 0
_step: int | None = None


def mark() -> None:
    """Something was got done: an evaluation batch, a piece of a checkpoint. Any thread calls it."""
    global _num_marks
    _num_marks += 1


def mark_step(step: int) -> None:
    """The run's step number `step` was finished."""
    global _step
    _step = step
    mark()


def num_marks() -> int:
    return _num_marks


def last_step() -> int | None:
    """The last step that this process finished, None before the first."""
    return _step
