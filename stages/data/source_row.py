"""A source row as it was read, and the errors of a row that cannot be used."""

from dataclasses import dataclass
from typing import Any


class BadRow(ValueError):
    """A malformed source row; `data.on_bad_row` decides whether it stops the stage."""


class Flagged(BadRow):
    """A row that is dropped under a reason of its own and listed in rejected.jsonl; it never stops the stage."""

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


@dataclass(frozen=True)
class SourceRow:
    """One row of the source with its location; `value` is None where it could not be read, for the reason in `problem`."""

    location: str
    value: dict[str, Any] | None
    problem: str | None = None
    source: str = ""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, for an error message of one line."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
