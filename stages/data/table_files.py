"""Rows of CSV, TSV and Excel files (.xlsx, the first sheet; extra 'excel'). The first line has the names of the columns.

Such a file has no types: every value is a `Cell`, a text that may be read as the number or list that it spells where one
is expected, so that an answer "007" or "true" stays as it was written. A cell with a conversation as JSON, or as pandas
writes one, is that conversation. An empty cell is an empty text.
"""

import ast
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

from cache.errors import DataError, MachineError
from stages.data.columns import Cell, shown
from stages.data.messages import is_conversation, is_message
from stages.data.source_row import SourceRow, first_line

DELIMITERS = {".csv": ",", ".tsv": "\t"}
BLOCK_BYTES = 1 << 24


def read_csv(path: Path, suffix: str) -> Iterator[SourceRow]:
    """Rows of a .csv or .tsv file; one with another number of cells than the first line carries the problem.

    A .csv file whose first line has semicolons and no commas, as Excel writes it in many countries, is separated by them.
    """
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    odd: list[tuple[int, str]] = []

    def note(row: Any) -> str:
        odd.append((row.number, f"expected {row.expected_columns} cells, found {row.actual_columns}"))
        return "skip"

    try:
        names, delimiter = _header(path, suffix)
        reader = arrow_csv.open_csv(
            path,
            arrow_csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
            arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note),
            arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
            ),
        )
        yield from _numbered((row for batch in reader for row in batch.to_pylist()), odd, path.name)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not a readable {suffix[1:]} file ({first_line(error)}). Save it as {suffix[1:].upper()} in UTF-8 with the names of the columns in the first line."
        ) from error


def _header(path: Path, suffix: str) -> tuple[list[str], str]:
    """The names in the first line, and what separates them. Raises `DataError` where a name is there twice."""
    import pyarrow as pa

    with pa.input_stream(str(path), compression="detect") as stream:
        line = stream.read(1 << 16).decode("utf-8", "ignore").removeprefix("\ufeff")
    first = (line.splitlines() or [""])[0]
    delimiter = DELIMITERS[suffix]
    if suffix == ".csv" and "," not in first and ";" in first:
        delimiter = ";"
    names = next(csv.reader(io.StringIO(line), delimiter=delimiter), [])
    _refuse_double(path, names)
    return names, delimiter


def _numbered(
    rows: Iterable[dict[str, str | None]], odd: list[tuple[int, str]], name: str
) -> Iterator[SourceRow]:
    """The rows with their numbers in the file; before each, the odd ones that were left out in front of it."""
    number = 0
    for row in rows:
        number += 1
        while odd and odd[0][0] == number + 1:  # the first line counts there
            yield SourceRow(f"{name}#{number}", None, odd.pop(0)[1])
            number += 1
        yield SourceRow(f"{name}#{number}", {column: _cell(value or "") for column, value in row.items()})
    for _, problem in odd:
        number += 1
        yield SourceRow(f"{name}#{number}", None, problem)


def read_excel(path: Path) -> Iterator[SourceRow]:
    """Rows of the first sheet of an .xlsx file; numbers and dates are texts, as in CSV."""
    try:
        from openpyxl import load_workbook
        from openpyxl.utils.exceptions import InvalidFileException
    except ModuleNotFoundError as error:
        raise MachineError(
            f"{path}: Excel files need openpyxl. Install it with pip install -e '.[excel]', or save the sheet as CSV in UTF-8."
        ) from error
    from zipfile import BadZipFile

    try:
        sheet = load_workbook(path, read_only=True, data_only=True).worksheets[0]
        rows = iter(sheet.iter_rows(values_only=True))
        names = [_written(name) for name in next(rows, ())]
        _refuse_double(path, names)
        for number, row in enumerate(rows, start=1):
            if any(value is not None for value in row):
                yield _sheet_row(f"{path.name}#{number}", names, row)
    except (BadZipFile, InvalidFileException, KeyError, OSError) as error:
        raise DataError(
            f"{path} is not a readable Excel file ({first_line(error)}). Save it again as .xlsx, or as CSV in UTF-8."
        ) from error


def _sheet_row(location: str, names: list[str], row: tuple[Any, ...]) -> SourceRow:
    """A row by the names above its cells; one with a value under no name carries the problem."""
    cells = list(zip_longest(names, row))
    nameless = next((value for name, value in cells if not name and value is not None), None)
    if nameless is not None:
        return SourceRow(location, None, f"the cell {shown(nameless)} has no name in the first line")
    return SourceRow(location, {name: _cell(_written(value)) for name, value in cells if name})


def _refuse_double(path: Path, names: list[str]) -> None:
    double = next((name for name in names if name and names.count(name) > 1), None)
    if double is not None:
        raise DataError(f"{path}: two columns have the name {double!r}. Rename one of them.")


def _written(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).casefold()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _cell(value: str) -> Any:
    """A text as a cell, or the message or messages that it spells."""
    if value[:1] in "[{" and value[:1]:
        for parse in (json.loads, ast.literal_eval, _array):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                found = parse(value)
                if is_conversation(found) or is_message(found):
                    return found
    return Cell(value)


def _array(value: str) -> Any:
    """A list as numpy prints it, without commas, which `Dataset.to_csv` writes."""
    return ast.literal_eval(re.sub(r"\}\s*\n\s*\{", "}, {", value))
