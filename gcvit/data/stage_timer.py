"""Seconds by stage, on the host: each moment belongs to the stage that was switched to last."""

import time


class Stopwatch:
    """Stages are texts; the moments of None are nobody's."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._since = 0.0
        self._seconds: dict[str, float] = {}

    def switch(self, stage: str | None) -> str | None:
        """From now on it is this stage's time; returns the one before."""
        now, before = time.perf_counter(), self._stage
        if before is not None:
            self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
        self._stage, self._since = stage, now
        return before

    def take(self) -> dict[str, float]:
        """What has added up since the last call, by stage."""
        self.switch(self._stage)
        seconds, self._seconds = self._seconds, {}
        return seconds
