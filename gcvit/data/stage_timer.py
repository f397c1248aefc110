"""Time the stages of work on the host: each moment belongs to the stage that was switched to last."""

import time


class StageTimer:
    """Add up seconds by stage, a text; the time of None is not counted."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._since = 0.0
        self._seconds: dict[str, float] = {}

    def switch(self, stage: str | None) -> str | None:
        """Begin another stage.

        Returns:
            The stage before.
        """
        now, before = time.perf_counter(), self._stage
        if before is not None:
            self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
        self._stage, self._since = stage, now
        return before

    def pop_seconds(self) -> dict[str, float]:
        """Return the seconds since the last call, by stage."""
        self.switch(self._stage)
        seconds, self._seconds = self._seconds, {}
        return seconds
