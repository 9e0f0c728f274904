"""The columns of a source that its format does not read, and those among them that would change what the rows mean.

A column is read when `convert` asks for its value, so no format has to list what it reads.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from cache.errors import DataError
from stages.data.messages import PROMPT_COLUMNS
from stages.data.source_row import BadRow, SourceRow
from stages.formats.column_map import columns_in, renamed
from stages.formats.contract import Format, Unusable
from stages.settings.data import DataSettings

WATCHED_ROWS = 100
PICTURES = frozenset({"image", "images", "video", "videos", "audio", "audios"})
# Columns that belong to the prompt wherever they are found, or say which part was judged.
MEANINGFUL = PICTURES | {
    "chat_history",
    "chat_template_kwargs",
    "context",
    "contexts",
    "documents",
    "history",
    "initial_reason_steps",
    "passages",
    "system",
    "systemInstruction",
    "system_instruction",
    "system_message",
    "system_prompt",
    "toolConfig",
    "tool_config",
    "tools",
    "turn",
}


class Watched(dict[str, Any]):
    """A row that notes whose values were asked for."""

    def __init__(self, row: Mapping[str, Any], read: set[str]) -> None:
        super().__init__(row)
        self._read = read

    def __getitem__(self, column: str) -> Any:
        self._read.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        """The value of a column."""
        self._read.add(column)
        return super().get(column, default)


def columns_not_read(head: Sequence[SourceRow], format_: type[Format], data: DataSettings) -> list[str]:
    """The columns of the first rows of a source that have values and are not read, in order.

    Raises `DataError` where one of them changes what the rows mean, unless it is in `data.ignore`; and where a name there
    is no column.
    """
    has = list(dict.fromkeys(column for row in head for column in row.value or {}))
    stray = next((column for column in data.ignore if column not in has), None)
    if stray is not None:
        raise DataError(f"data.ignore: {data.path} has no column {stray}. It has {', '.join(has)}.")
    unread = _unread(format_, renamed(head, data.columns))
    if data.columns is None:
        _refuse_misread(unread, format_, head, data)
        return list(unread)
    mapped = {column for path in data.columns.values() for column in columns_in(path)}
    return [column for column in has if column not in mapped]


def _unread(format_: type[Format], rows: Iterable[SourceRow]) -> dict[str, Any]:
    """The columns that no conversion of the first of these rows asks for, in order, each with a value it has."""
    read: set[str] = set()
    found: dict[str, Any] = {}
    values = (row.value for row in rows if row.value is not None)
    for value in islice(filter(format_.matches, values), WATCHED_ROWS):
        row = Watched(value, read)
        try:
            format_.convert({"rows": [row, row]} if format_.gathered_by else row)
        except (BadRow, Unusable):
            continue
        found = {**{column: part for column, part in value.items() if not _is_empty(part)}, **found}
    return {column: part for column, part in found.items() if column not in read}


def _refuse_misread(
    unread: Mapping[str, Any], format_: type[Format], rows: Sequence[SourceRow], data: DataSettings
) -> None:
    for column, value in unread.items():
        problem = "" if column in data.ignore else _misread(column, value, format_)
        if problem:
            where = next(row.location for row in rows if row.value and not _is_empty(row.value.get(column)))
            remedy = _mapping(column, value, next(row.value for row in rows if row.value))
            use = (
                f"Use it by mapping the columns in YAML, data.columns: {remedy}, or leave"
                if remedy
                else "Leave"
            )
            raise DataError(
                f"{where}: the column {column} {problem}. {use} it out on purpose with --set 'data.ignore=[{column}]'."
            )


def _misread(column: str, value: Any, format_: type[Format]) -> str:
    """What goes wrong where a column is not read; "" where nothing does."""
    if column in PICTURES:
        return "has pictures or sound, and models of text alone are trained"
    if column in MEANINGFUL:
        return f"is not read by the format {format_.name}, and changes what the rows mean"
    if format_.ranked and _is_list_of_numbers(value):
        return (
            f"is a list of numbers beside the answers, which the format {format_.name} takes by their order"
        )
    return ""


def _mapping(column: str, value: Any, row: Mapping[str, Any]) -> str:
    """A column map that uses the column; "" where no map can."""
    prompt = next((name for name in PROMPT_COLUMNS if name in row), "question")
    if column in PICTURES or column in ("turn", "chat_template_kwargs"):
        return ""
    if _is_list_of_numbers(value):
        answers = next(
            (name for name, part in row.items() if name != column and isinstance(part, list)), "..."
        )
        return f"{{prompt: {prompt}, responses: {answers}, rewards: {column}}}"
    if column.startswith("system"):
        return f"{{system: {column}, prompt: {prompt}, ...}}"
    return f'{{prompt: "{{{column}}}\\n{{{prompt}}}", ...}}'


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or value == [] or value == {}


def _is_list_of_numbers(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(isinstance(part, int | float) and not isinstance(part, bool) for part in value)
    )
