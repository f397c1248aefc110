"""The table at the end of a sharding run."""

from dataclasses import dataclass
from pathlib import Path

from data_prep.sidecar import Mark, Sidecar


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
            num_saved_bytes=sum(sidecar.num_source_bytes - int(sidecar.columns["length"].sum()) for sidecar in sidecars),
            num_written_samples=sum(sidecar.shard.num_samples for sidecar in written),
            num_written_bytes=sum(sidecar.shard.num_bytes for sidecar in written),
            seconds=seconds,
            folder=folder,
        )


def print_summary(rows: list[Row]) -> None:
    """A line per split; the column of saved bytes only where some image was re-encoded."""
    if not rows:
        return
    has_saved = any(row.num_saved_bytes for row in rows)
    table = [["split", "samples", "classes", "shards", "bytes", "saved", "seconds", "samples/s", "MB/s"]]
    for row in rows:
        seconds = max(row.seconds, 1e-9)
        table.append(
            [
                row.split,
                f"{row.num_samples:,}",
                f"{row.num_classes:,}",
                f"{row.num_shards:,}",
                f"{row.num_bytes:,}",
                f"{row.num_saved_bytes:,}",
                f"{row.seconds:.1f}",
                f"{row.num_written_samples / seconds:,.0f}",
                f"{row.num_written_bytes / seconds / 1e6:,.1f}",
            ]
        )
    if not has_saved:
        del (cells := [line.pop(5) for line in table])[:]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    folders = ["folder", *(str(row.folder) for row in rows)]
    for line, folder in zip(table, folders, strict=True):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), "", folder, flush=True)
