"""The table at the end of a sharding run."""

from dataclasses import dataclass
from pathlib import Path

from data_prep.shards.sidecar import Mark, Sidecar


@dataclass(frozen=True)
class Row:
    """A split: its shards as they stand, and how fast those of them came that this run wrote."""

    split: str
    num_samples: int
    num_classes: int
    num_shards: int
    num_bytes: int
    num_saved_bytes: int
    num_written_samples: int
    num_written_bytes: int
    seconds: float
    folder: Path

    @classmethod
    def of(cls, mark: Mark, sidecars: list[Sidecar], written: list[Sidecar], seconds: float, folder: Path) -> "Row":
        """`written` are the `sidecars` of shards that this run wrote, in `seconds`; the others were there."""
        return cls(
            split=mark.split,
            num_samples=sum(sidecar.shard.num_samples for sidecar in sidecars),
            num_classes=len(mark.classes),
            num_shards=len(sidecars),
            num_bytes=sum(sidecar.shard.num_bytes for sidecar in sidecars),
            num_saved_bytes=sum(
                sidecar.num_source_bytes - int(sidecar.columns["length"].sum()) for sidecar in sidecars
            ),
            num_written_samples=sum(sidecar.shard.num_samples for sidecar in written),
            num_written_bytes=sum(sidecar.shard.num_bytes for sidecar in written),
            seconds=seconds,
            folder=folder,
        )


def print_summary(rows: list[Row]) -> None:
    """A line per split; the column of saved bytes only where some image was re-encoded."""
    columns = {
        "split": [row.split for row in rows],
        "samples": [f"{row.num_samples:,}" for row in rows],
        "classes": [f"{row.num_classes:,}" for row in rows],
        "shards": [f"{row.num_shards:,}" for row in rows],
        "bytes": [f"{row.num_bytes:,}" for row in rows],
        "saved": [f"{row.num_saved_bytes:,}" for row in rows],
        "seconds": [f"{row.seconds:.1f}" for row in rows],
        "samples/s": [f"{row.num_written_samples / max(row.seconds, 1e-9):,.0f}" for row in rows],
        "MB/s": [f"{row.num_written_bytes / max(row.seconds, 1e-9) / 1e6:,.1f}" for row in rows],
    }
    if not any(row.num_saved_bytes for row in rows):
        del columns["saved"]
    widths = [max(map(len, [name, *cells])) for name, cells in columns.items()]
    lines = [[*columns, "folder"]]
    lines += [[*cells, str(row.folder)] for *cells, row in zip(*columns.values(), rows, strict=True)]
    for *cells, folder in lines:
        print(*(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)), folder, sep="  ", flush=True)
