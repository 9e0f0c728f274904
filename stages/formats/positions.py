"""Column maps that take the better answer by its place, where the data says that the better one is not always there."""

from collections.abc import Mapping, Sequence
from typing import Any

from cache.errors import DataError
from stages.data.source_row import SourceRow
from stages.formats.column_map import EVERY, steps_of, value_at
from stages.settings.data import DataSettings

VERDICTS = ("verdict", "winner", "preference", "preferred", "label", "labels", "choice", "better")
LOWER_IS_BETTER = "rank"


def refuse_sides_by_position(head: Sequence[SourceRow], data: DataSettings) -> None:
    """Raise `DataError` where `data.columns` takes chosen and rejected from a list and numbers beside them alternate."""
    columns = data.columns or {}
    if not {"chosen", "rejected"} <= columns.keys():
        return
    chosen, rejected = (steps_of(columns[side]) for side in ("chosen", "rejected"))
    place = next(
        (at for at, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other), 0
    )
    if not place or not chosen[place].isdigit() or not rejected[place].isdigit():
        return
    rows = [(row.location, row.value) for row in head if row.value is not None]
    before = {}
    for location, row in rows:
        for name, sign in _signs(row, chosen[:place], int(chosen[place]), int(rejected[place])):
            if sign and before.setdefault(name, sign) != sign:
                raise DataError(_alternates(location, name, columns, chosen, place))
    used = {steps_of(path)[0] for path in columns.values()}
    for name in VERDICTS:
        values = {str(row.get(name)) for _, row in rows if row.get(name) is not None}
        if name not in used and name not in data.ignore and 1 < len(values) <= 5:
            raise DataError(
                f"data.columns takes the better answer by its place, but {name} is {' or '.join(sorted(values))}. Map a, b and the verdict instead: {{prompt: {columns.get('prompt', 'question')}, a: {columns['chosen']}, b: {columns['rejected']}, verdict: {name}}}, or name it in data.ignore."
            )


def _signs(row: Mapping[str, Any], path: list[str], chosen: int, rejected: int) -> list[tuple[str, int]]:
    """The names of numbers that both answers have, each with 1 where the chosen one's is larger, -1 where it is smaller."""
    listed = value_at(row, path)
    if not isinstance(listed, list) or max(chosen, rejected) >= len(listed):
        return []
    one, other = listed[chosen], listed[rejected]
    found = [
        (name, row[name]) for name in row if isinstance(row[name], list) and len(row[name]) == len(listed)
    ]
    pairs = [(name, (values[chosen], values[rejected])) for name, values in found]
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        pairs += [
            (f"{'.'.join(path)}[{EVERY}].{name}", (one[name], other[name])) for name in one if name in other
        ]
    return [
        (name, (first > second) - (first < second))
        for name, (first, second) in pairs
        if all(isinstance(value, int | float) for value in (first, second))
    ]


def _alternates(location: str, name: str, columns: Mapping[str, str], chosen: list[str], place: int) -> str:
    answers = ".".join(chosen[:place]) + f"[{EVERY}]" + "".join(f".{step}" for step in chosen[place + 1 :])
    numbers = "ranks" if name.endswith(LOWER_IS_BETTER) else "rewards"
    return (
        f"{location}: data.columns takes the better answer by its place, but {name} is now higher for one place, now for the other. "
        f'Map the list and these numbers: {{prompt: {columns.get("prompt", "question")}, responses: "{answers}", {numbers}: "{name}"}}.'
    )
