"""Count the progress of this process, for its watchdog and for its exit report."""

_num_marks = 0
_step: int | None = None


def mark() -> None:
    """Record that some work is done: an evaluation batch, a part of a checkpoint. Any thread may call it."""
    global _num_marks
    _num_marks += 1


def mark_step(step: int) -> None:
    """Record that the training step `step` is done."""
    global _step
    _step = step
    mark()


def num_marks() -> int:
    """Return how often progress was recorded."""
    return _num_marks


def last_step() -> int | None:
    """Return the last training step that this process finished, None before the first."""
    return _step
