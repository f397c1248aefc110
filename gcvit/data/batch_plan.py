"""How a global batch is divided: into one share per rank, and each share into micro-batches.

The config fixes the global batch size. The number of devices changes only the micro-batch and the accumulation.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gcvit.config.schema import Config
from gcvit.errors import UserError

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchPlan:
    """The arithmetic of one optimizer step on `world_size` ranks.

    Where samples are `paired` (mixup, cutmix), positions 2k and 2k+1 stay on one rank and in one micro-batch.
    `micro_batch_size` is the most samples of a micro-batch; None is a rank's whole share.
    """

    global_batch_size: int
    world_size: int
    micro_batch_size: int | None
    paired: bool

    def __post_init__(self) -> None:
        assert self.global_batch_size % self.unit == 0, "the config refuses an odd batch where samples are paired"

    @classmethod
    def from_config(cls, config: Config, world_size: int, micro_batch_size: int | None) -> "BatchPlan":
        """Plan the batches of a config.

        Args:
            config: gives the global batch size, and whether samples are paired.
            micro_batch_size: usually `config.trainer.resolved_micro_batch_size`, which may still have to be found.
        """
        return cls(config.global_batch_size, world_size, micro_batch_size, config.augment.is_paired)

    @property
    def unit(self) -> int:
        """Samples that stay together: 2 where they are paired, else 1."""
        return 2 if self.paired else 1

    @property
    def largest_share(self) -> int:
        """Samples of the largest share; the smallest has at most one unit less."""
        return _divide_up(self._num_units, self.world_size) * self.unit

    @property
    def capacity(self) -> int:
        """Samples of a full micro-batch: a multiple of `unit`, at most the largest share.

        Raises:
            UserError: a pair does not fit into a micro-batch.
        """
        if self.micro_batch_size is None:
            return self.largest_share
        if self.micro_batch_size < self.unit:
            raise UserError(
                "trainer.micro_batch_size holds no pair of samples, which mixup and cutmix need",
                got=self.micro_batch_size,
                expected="2 or more, or null",
                hint="raise it, or write augment.mix=null",
            )
        return min(self.micro_batch_size // self.unit * self.unit, self.largest_share)

    @property
    def num_micro_steps(self) -> int:
        """Micro-steps of an optimizer step: equal on all ranks, although their shares may differ by one unit.

        Raises:
            UserError: a pair does not fit into a micro-batch.
        """
        return _divide_up(self.largest_share, self.capacity)

    @property
    def has_empty_shares(self) -> bool:
        """Whether there are fewer units than ranks, so that some ranks have no sample."""
        return self._num_units < self.world_size

    def share(self, rank: int, lanes: int) -> Positions:
        """List the positions in the global batch that `rank` reads.

        Shares differ by at most one unit. They are cut lane by lane, so that a rank keeps whole lanes through an
        epoch if the world size and the number of lanes allow it (see `holds_whole_lanes`).

        Returns:
            Ascending positions, int64 [share].
        """
        by_lane = np.arange(self._num_units).reshape(-1, self._lane_period(lanes)).T.reshape(-1)
        low, high = self._cuts[rank : rank + 2]
        units = np.sort(by_lane[low:high])
        return (units[:, None] * self.unit + np.arange(self.unit)).reshape(-1)

    def micro_batches(self, rank: int, lanes: int) -> list[Positions]:
        """Cut the share of `rank` into `num_micro_steps` micro-batches.

        Returns:
            Ascending positions of each, int64 [at most `capacity`]; the last ones may be short or empty.

        Raises:
            UserError: a pair does not fit into a micro-batch.
        """
        return cut_consecutive(self.share(rank, lanes), self.num_micro_steps, self.capacity)

    def holds_whole_lanes(self, lanes: int) -> bool:
        """Tell whether each lane belongs to one rank through an epoch, so that each chunk is read by one rank alone.

        This holds where the world size divides the lanes and the lanes divide the batch, and in some other cases.
        """
        slots_per_lane = self._num_units // self._lane_period(lanes)
        return lanes % self.unit == 0 and all(cut % slots_per_lane == 0 for cut in self._cuts)

    def even_micro_batch(self, num_micro_steps: int) -> int:
        """Compute the smallest micro-batch with which the largest share takes at most `num_micro_steps`."""
        return _divide_up(self.largest_share // self.unit, num_micro_steps) * self.unit

    def split_evenly(self, most: int) -> int:
        """Compute the smallest micro-batch that needs no more micro-steps than one of `most` samples."""
        full = max(most, self.unit) // self.unit * self.unit
        return self.even_micro_batch(_divide_up(self.largest_share, full))

    @property
    def _num_units(self) -> int:
        return self.global_batch_size // self.unit

    @property
    def _cuts(self) -> list[int]:
        return [self._num_units * rank // self.world_size for rank in range(self.world_size + 1)]

    def _lane_period(self, lanes: int) -> int:
        # Unit k of the batch meets only lanes that are congruent to k (plus a constant of the epoch) modulo this.
        return math.gcd(self._num_units, lanes // self.unit)


def check_world(num_samples: int, world_size: int) -> None:
    """Check that there is a sample for each rank.

    Raises:
        UserError: there are more ranks than samples.
    """
    if world_size > num_samples:
        raise UserError(
            "more processes than samples",
            got=f"{world_size} for {num_samples}",
            hint="start fewer processes",
        )


def cut_consecutive(values: Positions, num_pieces: int, size: int) -> list[Positions]:
    """Cut `values` into `num_pieces` pieces of `size` each; the last ones may be short or empty."""
    assert len(values) <= num_pieces * size
    return [values[piece * size : (piece + 1) * size] for piece in range(num_pieces)]


def _divide_up(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
