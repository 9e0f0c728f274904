"""Typed access to the columns of a source row; a value of another type raises a `BadRow` that names the column."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from stages.data.source_row import BadRow, Flagged

NOT_TEXT = "not_text"


class Cell(str):
    """A value of a file without types, such as CSV: a text, or the number or list that it spells."""


def is_absent(value: Any) -> bool:
    """Whether a column has no value: null, or an empty cell."""
    return value is None or (value == "" and isinstance(value, Cell))


def _typed(value: Any) -> Any:
    """What a cell spells as JSON, or its text; any other value unchanged."""
    if not isinstance(value, Cell):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return str(value)


def finite_number(value: Any, column: str) -> float:
    """The value as a float; raises `BadRow` unless it is a finite number."""
    value = _typed(value)
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise BadRow(f"{column}: expected a finite number, found {shown(value)}")


def one_of(row: Mapping[str, Any], column: str, choices: Sequence[Any]) -> Any:
    """The one of `choices` that a column has: true is not 1, and "1" is not 1, but 1.0, as pandas writes it, is."""
    value = _typed(row.get(column))
    for choice in choices:
        if value == choice and (
            type(value) is type(choice) or (type(value) is float and type(choice) is int)
        ):
            return choice
    raise BadRow(
        f"{column}: expected {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}, found {shown(value)}"
    )


def truth(row: Mapping[str, Any], column: str) -> bool:
    """A column with true or false, or 1 or 0."""
    value = _typed(row.get(column))
    if not isinstance(value, bool) and value not in (0, 1):
        raise BadRow(f"{column}: expected true or false, found {shown(value)}")
    return bool(value)


def text(row: Mapping[str, Any], column: str) -> str:
    """A column with text that can be encoded as UTF-8."""
    value = row.get(column)
    if isinstance(value, bool):
        # Converters turn answers such as "true" and "no" into booleans; prepare refuses a column with mostly those.
        raise Flagged(NOT_TEXT, f"{column}: expected text, found {shown(value)}")
    if not isinstance(value, str):
        raise BadRow(f"{column}: expected text, found {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{column}: character {error.start} is half a surrogate pair, which UTF-8 cannot encode"
        ) from error
    return str(value)


def is_utf8(value: str) -> bool:
    """Whether the text can be encoded as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def optional_text(row: Mapping[str, Any], column: str) -> str:
    """A column with text; "" where it is absent, null or blank."""
    return "" if row.get(column) is None or not text(row, column).strip() else text(row, column)


def entries(row: Mapping[str, Any], column: str) -> list[Any]:
    """A column with a list."""
    value = _typed(row.get(column))
    if not isinstance(value, list):
        raise BadRow(f"{column}: expected a list, found {shown(value)}")
    return value


def mapping(row: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """A column with an object."""
    value = row.get(column)
    if not isinstance(value, Mapping):
        raise BadRow(f"{column}: expected an object, found {shown(value)}")
    return value


def json_of(value: Any, column: str) -> Any:
    """A text parsed as JSON; any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{column}: expected JSON, found {shown(value)}") from error


def shown(value: Any) -> str:
    """A value for an error message: escaped, and at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
