r"""`data.columns`: rows of any other schema, with their columns renamed to those of a known format.

The left side of the map is a column of a format. The right side is the name of a column; or a path from one into objects
and lists, `answers.0.text`, where `[*]` stands for every entry, `answers[*].score`; or a text with such paths in braces,
`{question}\n{context}`. A text in which a path goes on is read as JSON.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from stages.data.columns import json_of, shown
from stages.data.source_row import BadRow, SourceRow

ABSENT = object()
EVERY = "*"
_FIELD = re.compile(r"\{([^{}]+)\}")


def renamed(rows: Iterable[SourceRow], columns: Mapping[str, str] | None) -> Iterator[SourceRow]:
    """Rows with the mapped columns only; a row without one of them carries the problem."""
    for row in rows:
        if columns is None or row.value is None:
            yield row
            continue
        try:
            found = {name: _value(row.value, path) for name, path in columns.items()}
        except BadRow as problem:
            yield replace(row, value=None, problem=f"{problem}; the row has {', '.join(row.value)}"[:300])
        else:
            yield replace(row, value=found)


def columns_in(path: str) -> list[str]:
    """The columns of the source in which the paths of a map's right side begin."""
    found = _FIELD.findall(path) or [path]
    return [part for name in found for part in (name, steps_of(name)[0])]


def steps_of(path: str) -> list[str]:
    """The steps of a path: `a[*].b.0` has a, *, b and 0."""
    return path.replace("[*]", f".{EVERY}").replace("[", ".").replace("]", "").split(".")


def _value(row: Mapping[str, Any], path: str) -> Any:
    if path not in row and _FIELD.search(path):
        return _FIELD.sub(lambda match: _text(row, match[1]), path)
    value = row[path] if path in row else value_at(row, steps_of(path))
    if value is ABSENT:
        raise BadRow(f"{path}: no such column, but data.columns maps it")
    return value


def _text(row: Mapping[str, Any], path: str) -> str:
    value = _value(row, path)
    if value is None or isinstance(value, str):
        return value or ""
    raise BadRow(f"{path}: expected text, found {shown(value)}")


def value_at(value: Any, steps: list[str]) -> Any:
    """The value at a path, or `ABSENT`."""
    for place, step in enumerate(steps):
        value = json_of(value, ".".join(steps[:place]))
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step == EVERY:
            found = [value_at(entry, steps[place + 1 :]) for entry in value]
            return ABSENT if any(entry is ABSENT for entry in found) else found
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return ABSENT
    return value
