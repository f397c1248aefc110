"""Tables of the page, as plain data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    text: str
    is_number: bool = False
    is_strong: bool = False
    is_alarm: bool = False
    color: str = ""
    """The palette's name of a run's colour, shown as a dot before the text."""


@dataclass(frozen=True)
class Table:
    """On a narrow page each row becomes a card, where the head's words stand beside their values."""

    head: list[str]
    rows: list[list[Cell]]
