"""Damaged samples have a budget: training replaces them, counts them over all ranks, and stops past the budget."""

from collections.abc import Iterable

from gcvit.data.batch import Batch, Damage
from gcvit.errors import UserError
from gcvit.runtime.distributed import World

_NUM_LISTED = 20  # of the error's message; metrics.jsonl has them all


class DamageBudget:
    """The damaged samples of `num_samples` that this run has met since it was started; each counts once."""

    def __init__(self, num_samples: int, max_fraction: float):
        self.found: dict[int, Damage] = {}
        self._num_samples, self._max_fraction = num_samples, max_fraction
        self._here: dict[int, Damage] = {}  # met by this rank since the ranks last told each other

    def add(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            self._here.update((damage.sample, damage) for damage in batch.damaged)

    def settle(self, world: World) -> list[Damage]:
        """What any rank has met since the last call and was not known before. Every rank calls it."""
        told = {sample: damage for here in world.gather(self._here) for sample, damage in here.items()}
        self._here = {}
        new = [told[sample] for sample in sorted(told.keys() - self.found.keys())]
        self.found.update((damage.sample, damage) for damage in new)
        return new

    def check(self) -> None:
        """Errors: UserError, on all ranks alike, where more is damaged than `data.max_damaged_fraction` allows."""
        allowed = int(self._num_samples * self._max_fraction)
        if len(self.found) > allowed:
            listed = [f"{damage.where} ({damage.reason})" for damage in list(self.found.values())[:_NUM_LISTED]]
            raise UserError(
                "too many samples are damaged",
                got=f"{len(self.found)} of {self._num_samples}: {'; '.join(listed)}"
                + ("; ..." if len(self.found) > _NUM_LISTED else ""),
                allowed=f"{allowed} (data.max_damaged_fraction={self._max_fraction:g})",
                cure="python -m data_prep.verify DIR --repair, or raise data.max_damaged_fraction",
            )
