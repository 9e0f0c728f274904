"""Tables and docstrings as Markdown, for the scripts that write into the documents."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


def summary(documented: Any) -> str:
    """The first paragraph of a docstring in one line."""
    return " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split())


def escaped(cell: str) -> str:
    """A text that stays in its cell."""
    return cell.replace("|", "\\|")
