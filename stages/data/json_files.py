"""Rows of JSON and JSONL files, also as .gz. Duplicate keys, NaN, infinities and invalid UTF-8 are refused.

JSONL is read line by line, so that memory stays flat and every message can name file and line; `datasets` would fail
the whole file without a row number and turn date-like text into timestamps.
"""

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cache.errors import DataError
from stages.data.source_row import SourceRow, first_line

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@contextmanager
def _open(path: Path):
    """Open a file for its bytes, decompressed; raises `DataError` for a damaged .gz."""
    if path.suffix != ".gz":
        with open(path, "rb") as handle:
            yield handle
        return
    try:
        with gzip.open(path, "rb") as handle:
            yield handle
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} is not a complete .gz file ({first_line(error)}). Copy or download it again."
        ) from error


def read_jsonl(path: Path) -> Iterator[SourceRow]:
    """Rows of a .jsonl file, one for each line that is not blank."""
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            location = f"{path.name}:{number}"
            text = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if not text.strip():
                continue
            try:
                value = parse_json(text)
            except ValueError as error:
                yield SourceRow(location, None, str(error))
                continue
            if isinstance(value, dict):
                yield SourceRow(location, value)
            else:
                yield SourceRow(location, None, f"expected a JSON object, found {type(value).__name__}")


def read_json(path: Path) -> Iterator[SourceRow]:
    """Rows of a .json file: an array of objects, or an object of objects. The file is read whole."""
    with _open(path) as handle:
        content = handle.read().removeprefix(BYTE_ORDER_MARK)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise DataError(
            f"{path}: {error}. Expected a JSON array of objects; one object a line goes in a .jsonl file."
        ) from error
    _refuse_pandas(value, path)
    if isinstance(value, dict) and value and all(isinstance(entry, dict) for entry in value.values()):
        # An object of objects, as ODPO's file: the key becomes a column of the row.
        value = [{"key": key, **entry} for key, entry in value.items()]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a JSON array of objects, found {type(value).__name__}.")
    for number, row in enumerate(value, start=1):
        location = f"{path.name}#{number}"
        if isinstance(row, dict):
            yield SourceRow(location, row)
        else:
            yield SourceRow(location, None, f"expected an object, found {type(row).__name__}")


def _refuse_pandas(value: Any, path: Path) -> None:
    """Raise `DataError` for a table as pandas writes it by default, by columns, and in two other orientations."""
    if not isinstance(value, dict) or not value:
        return
    parts = list(value.values())
    numbered = isinstance(parts[0], dict) and bool(parts[0]) and all(key.isdigit() for key in parts[0])
    by_columns = numbered and all(isinstance(part, dict) and part.keys() == parts[0].keys() for part in parts)
    if by_columns or {"columns", "data"} <= value.keys() or {"schema", "data"} <= value.keys():
        raise DataError(
            f"{path} is a table in an orientation of pandas that has no rows. Write it with df.to_json('{path.stem}.jsonl', orient='records', lines=True)."
        )


def parse_json(content: bytes) -> Any:
    """A JSON value, with duplicate keys, NaN, infinities and invalid UTF-8 refused (ValueError)."""
    try:
        text = content.decode("utf-8")
        value = _PLAIN.decode(text)
        # Every key is followed by a colon. Where there are as many keys as such places, none appeared twice.
        return value if _num_keys(value) == len(_KEY.findall(text)) else _UNIQUE.decode(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _num_keys(value: Any) -> int:
    count, waiting = 0, [value]
    for part in waiting:  # the list grows while it is read
        if type(part) is dict:
            count += len(part)
            waiting += part.values()
        elif type(part) is list:
            waiting += part
    return count


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return row


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number} is larger than any float")
    return value


_KEY = re.compile(r'"[ \t\r\n]*:')
_PLAIN = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)
_UNIQUE = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
