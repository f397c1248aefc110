"""Count the corrupt samples over all ranks, and stop the training where they exceed a budget."""

from collections.abc import Iterable

from gcvit.data.batch import Batch, Corruption
from gcvit.errors import UserError
from gcvit.runtime.distributed import World

_NUM_LISTED = 20  # in the error's message; metrics.jsonl has all


class CorruptionBudget:
    """The corrupt samples of `num_samples` that this run has read since its start; each counts once."""

    def __init__(self, num_samples: int, max_fraction: float):
        self.found: dict[int, Corruption] = {}
        self._num_samples, self._max_fraction = num_samples, max_fraction
        self._here: dict[int, Corruption] = {}  # read by this rank since the last sync

    def add(self, batches: Iterable[Batch]) -> None:
        """Record the corrupt samples of this rank's batches."""
        for batch in batches:
            self._here.update((corruption.sample, corruption) for corruption in batch.corrupt)

    def sync(self, world: World) -> list[Corruption]:
        """Exchange the records of all ranks. Every rank calls it.

        Returns:
            The corrupt samples that any rank has read since the last call and that were not known before.
        """
        gathered = {sample: corruption for here in world.gather(self._here) for sample, corruption in here.items()}
        self._here = {}
        new = [gathered[sample] for sample in sorted(gathered.keys() - self.found.keys())]
        self.found.update((corruption.sample, corruption) for corruption in new)
        return new

    def check(self) -> None:
        """Check the budget.

        Raises:
            UserError: more is corrupt than `data.max_corrupt_fraction` allows, on all ranks alike.
        """
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
