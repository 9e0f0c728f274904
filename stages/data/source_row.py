"""A row of the source, as it was read, and the errors of one that cannot be used."""

from dataclasses import dataclass
from typing import Any


class BadRow(ValueError):
    """A source row that cannot be read as its format says; `data.on_bad_row` decides what happens."""


class Flagged(BadRow):
    """A row that is dropped under a reason of its own and listed, but never stops the stage."""

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


@dataclass(frozen=True)
class SourceRow:
    """One row of the source, or the reason why it could not be read."""

    location: str
    value: dict[str, Any] | None
    problem: str | None = None
    source: str = ""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, for a message of one line."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
