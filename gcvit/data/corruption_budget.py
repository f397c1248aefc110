"""Corrupt samples have a budget: training replaces them, counts them over all ranks, and stops past the budget."""

from collections.abc import Iterable

from gcvit.data.batch import Batch, Corruption
from gcvit.errors import UserError
from gcvit.runtime.distributed import World

_NUM_LISTED = 20  # of the error's message; metrics.jsonl has them all


class CorruptionBudget:
    """The corrupt samples of `num_samples` that this run has met since it was started; each counts once."""

    def __init__(self, num_samples: int, max_fraction: float):
        self.found: dict[int, Corruption] = {}
        self._num_samples, self._max_fraction = num_samples, max_fraction
        self._here: dict[int, Corruption] = {}  # met by this rank since the ranks last told each other

    def add(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            self._here.update((corruption.sample, corruption) for corruption in batch.corrupt)

    def settle(self, world: World) -> list[Corruption]:
        """What any rank has met since the last call and was not known before. Every rank calls it."""
        told = {sample: corruption for here in world.gather(self._here) for sample, corruption in here.items()}
        self._here = {}
        new = [told[sample] for sample in sorted(told.keys() - self.found.keys())]
        self.found.update((corruption.sample, corruption) for corruption in new)
        return new

    def check(self) -> None:
        """Errors: UserError, on all ranks alike, where more is corrupt than `data.max_corrupt_fraction` allows."""
        allowed = int(self._num_samples * self._max_fraction)
        if len(self.found) > allowed:
            listed = [
                f"{corruption.where} ({corruption.reason})" for corruption in list(self.found.values())[:_NUM_LISTED]
            ]
            raise UserError(
                "too many samples are corrupt",
                got=f"{len(self.found)} of {self._num_samples}: {'; '.join(listed)}"
                + ("; ..." if len(self.found) > _NUM_LISTED else ""),
                expected=f"{allowed} (data.max_corrupt_fraction={self._max_fraction:g})",
                hint="python -m data_prep.verify DIR --repair, or raise data.max_corrupt_fraction",
            )
