"""The index of a run's checkpoints, which is merged from the ranks' ranges once and not at every save."""

from gcvit.checkpoint.format import Row, encode_index, merge_rows
from gcvit.runtime.distributed import World


class IndexCache:
    """The encoded index of a run's checkpoints, which stays the same as long as each rank holds the same ranges."""

    def __init__(self) -> None:
        self._rows: list[Row] | None = None
        self._encoded = ""

    def encode(self, rows: list[Row], world: World) -> str:
        """Merge the rows of all ranks on rank 0, unless they are those of the call before.

        Returns the encoded index on rank 0, and an empty text elsewhere.
        """
        if any(world.gather(rows != self._rows)):
            rows_of_ranks = world.gather_on_rank0(rows)
            self._rows = rows
            self._encoded = encode_index(merge_rows(rows_of_ranks)) if world.is_rank0 else ""
        return self._encoded
