"""Columns of a source row, checked: numbers, text, lists, objects; anything else is a `BadRow` that names the column."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from stages.data.source_row import BadRow, Flagged

NOT_TEXT = "not_text"


def finite_number(value: Any, column: str) -> float:
    """A finite number."""
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise BadRow(f"{column}: expected a finite number, found {shown(value)}")


def one_of(row: Mapping[str, Any], column: str, choices: Sequence[Any]) -> Any:
    """A column that holds one of `choices`; true is not 1 and "1" is not 1."""
    value = row.get(column)
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise BadRow(
            f"{column}: expected {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}, found {shown(value)}"
        )
    return value


def truth(row: Mapping[str, Any], column: str) -> bool:
    """A column that holds true or false, or 1 or 0."""
    value = row.get(column)
    if not isinstance(value, bool) and value not in (0, 1):
        raise BadRow(f"{column}: expected true or false, found {shown(value)}")
    return bool(value)


def text(row: Mapping[str, Any], column: str) -> str:
    """A column that holds text, encodable as UTF-8."""
    value = row.get(column)
    if isinstance(value, bool):
        # What a converter makes of an answer "true" or "no"; prepare refuses a column of nothing else.
        raise Flagged(NOT_TEXT, f"{column}: expected text, found {shown(value)}")
    if not isinstance(value, str):
        raise BadRow(f"{column}: expected text, found {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{column}: half a surrogate pair at character {error.start}, which is no text"
        ) from error
    return value


def is_utf8(value: str) -> bool:
    """Whether text can be encoded as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def optional_text(row: Mapping[str, Any], column: str) -> str:
    """A column that holds text, or is absent, null or blank: then the empty text."""
    return "" if row.get(column) is None or not text(row, column).strip() else text(row, column)


def entries(row: Mapping[str, Any], column: str) -> list[Any]:
    """A column that holds a list."""
    value = row.get(column)
    if not isinstance(value, list):
        raise BadRow(f"{column}: expected a list, found {shown(value)}")
    return value


def mapping(row: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """A column that holds an object."""
    value = row.get(column)
    if not isinstance(value, Mapping):
        raise BadRow(f"{column}: expected an object, found {shown(value)}")
    return value


def json_of(value: Any, column: str) -> Any:
    """JSON text parsed; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{column}: expected JSON, found {shown(value)}") from error


def shown(value: Any) -> str:
    """A value in an error message: escaped and cut."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
