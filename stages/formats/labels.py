"""What a value of a label or verdict column means: good or bad, the first answer or the second.

`data.labels` says it, value by value: `{up: true, down: false}` for labels, `{"1": a, "2": b, "<0": a}` for verdicts;
null drops the row. Words that have one meaning need no map; numbers other than 1 and 0 for a label do, because which of
two answers a number stands for differs from data set to data set.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from cache.errors import DataError, UsageError
from stages.data.columns import shown
from stages.data.source_row import BadRow, SourceRow
from stages.formats.contract import Format, Unusable
from stages.settings.data import DataSettings, Meaning

FAMILIES = (
    ("up", "down"),
    ("thumbs_up", "thumbs_down"),
    ("thumbs up", "thumbs down"),
    ("👍", "👎"),
    ("good", "bad"),
    ("yes", "no"),
    ("like", "dislike"),
    ("positive", "negative"),
    ("desirable", "undesirable"),
    ("accepted", "rejected"),
    ("true", "false"),
    ("1", "-1"),
    ("1", "0"),
)
TIES = (
    "tie",
    "tie (bothbad)",
    "tie (inconsistent)",
    "both_bad",
    "bothbad",
    "a=b",
    "a==b",
    "[[c]]",
    "equal",
    "draw",
)
NAMES = ("", "model_", "response_", "answer_", "output_", "completion_")
VERDICTS: dict[str, Meaning] = {
    **{f"{name}{side}": side for side in ("a", "b") for name in NAMES},
    **{f"[[{side}]]": side for side in ("a", "b")},
    **{f"{side}-is-{how}-better": side for side in ("a", "b") for how in ("clearly", "slightly")},
    **{"a>b": "a", "a>>b": "a", "b<a": "a", "b>a": "b", "b>>a": "b", "a<b": "b", "a<<b": "b"},
    **dict.fromkeys(TIES, "tie"),
}
_COMPARED = re.compile(r"(<=|>=|<|>)\s*(-?\d+(?:\.\d+)?)")


def key_of(value: Any) -> str:
    """A value as `data.labels` names it: text without case and blanks around it, whole numbers without a point."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).casefold()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    key = str(value).strip().casefold().removesuffix("\ufe0f")
    return key[:-2] if re.fullmatch(r"-?\d+\.0", key) else key


def meaning(value: Any, labels: Mapping[str, Meaning], column: str) -> tuple[Meaning, float | None]:
    """What a value means; and where a comparison such as "<0" says it, the value's size, which is a margin."""
    key = key_of(value)
    if key in labels:
        return labels[key], None
    number = _number(key)
    for test, meant in labels.items():
        if number is not None and (found := _COMPARED.fullmatch(test)) and _holds(number, *found.groups()):
            return meant, abs(number)
    known = ", ".join([*labels][:6]) + (", ..." if len(labels) > 6 else "")
    raise BadRow(
        f"{column}: expected one of {known}, or a value that data.labels explains, found {shown(value)}"
    )


def labels_of(
    format_: type[Format], rows: Iterable[SourceRow], data: DataSettings
) -> tuple[dict[str, Meaning], str]:
    """The meanings of the values of a format's label columns in the first rows, and what to say where they were guessed.

    Empty where the format reads them itself. Raises `DataError` for labels whose meaning is not plain, and `UsageError`
    for a map that does not fit the format.
    """
    names = format_.label_columns
    if data.labels:
        strange = [key for key, meant in data.labels.items() if meant not in (*format_.meanings, None)]
        if not names or strange:
            expected = " or ".join(str(meant).casefold() for meant in format_.meanings)
            problem = f"{strange[0]} is none of {expected}" if names else "its columns are no labels"
            raise UsageError(
                f"data.labels: {data.path} has format {format_.name}, and {problem}. Fix the map, or leave it out."
            )
        return {key_of(key): meant for key, meant in data.labels.items()}, ""
    if True not in format_.meanings:
        return {}, ""
    found = [
        (row.location, name, row.value[name])
        for row in rows
        if row.value is not None
        for name in names
        if name in row.value
    ]
    keys = {key_of(value) for _, _, value in found} - {"null", ""}
    if not keys or (
        not any(isinstance(value, str) for _, _, value in found)
        and (keys <= {"true", "false"} or keys <= {"1", "0"})
    ):
        return {}, ""
    family = next((family for family in FAMILIES if keys <= set(family)), None)
    if family is not None:
        good, bad = family
        return {good: True, bad: False}, f"{found[0][1]}: {good} is desirable, {bad} undesirable"
    if data.threshold is not None and all(_number(key) is not None for key in keys):
        limit = f"{data.threshold:g}"
        return {f">={limit}": True, f"<{limit}": False}, ""
    location, name, _ = found[0]
    values = ", ".join(sorted(keys)[:6]) + (", ..." if len(keys) > 6 else "")
    remedy = "--set 'data.labels={up: true, down: false}' with your values"
    if all(_number(key) is not None for key in keys):
        remedy += ", or the value from which on a response is good with --set data.threshold=VALUE"
    raise DataError(
        f"{location}: {name} has values whose meaning is not plain: {values}. Say which are good with {remedy}."
    )


def labelled_row(
    row: Mapping[str, Any], format_: type[Format], labels: Mapping[str, Meaning]
) -> Mapping[str, Any]:
    """The row with the meanings of its labels in their place. Raises `Unusable` where a label is null or dropped."""
    changed: dict[str, Any] = {}
    for column in format_.label_columns:
        if column in row:
            value = row[column]
            meant, margin = (None, None) if key_of(value) in ("", "null") else meaning(value, labels, column)
            if meant is None:
                raise Unusable(f"no_{column}")
            changed[column] = meant
            changed |= {} if margin is None or "margin" in row else {"margin": margin}
    return {**row, **changed}


def _number(key: str) -> float | None:
    try:
        return float(key)
    except ValueError:
        return None


def _holds(number: float, sign: str, limit: str) -> bool:
    other = float(limit)
    return {"<": number < other, ">": number > other, "<=": number <= other, ">=": number >= other}[sign]
