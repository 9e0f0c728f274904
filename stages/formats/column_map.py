"""`data.columns`: any other schema, its columns renamed to those of a format that is known."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from stages.data.source_row import SourceRow

ABSENT = object()


def renamed(rows: Iterable[SourceRow], columns: Mapping[str, str] | None) -> Iterator[SourceRow]:
    """Rows that hold the mapped columns only; a row without one of them carries the problem.

    `columns` is from the name a format knows to the source's own, in which `output.0.text` goes into objects
    and lists where there is no column of that whole name.
    """
    for row in rows:
        if columns is None or row.value is None:
            yield row
            continue
        found = {name: _at(row.value, path) for name, path in columns.items()}
        missing = [columns[name] for name, value in found.items() if value is ABSENT]
        if missing:
            problem = f"{missing[0]}: no such column, and data.columns asks for it; the row has {', '.join(row.value)}"
            yield replace(row, value=None, problem=problem[:300])
        else:
            yield replace(row, value=found)


def _at(value: Any, path: str) -> Any:
    if isinstance(value, Mapping) and path in value:
        return value[path]
    for step in path.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return ABSENT
    return value
