"""Rows of Parquet files and of Arrow files (file or stream format), with one batch in memory at a time.

A value is what it would be in JSON. A struct column has the fields of all its rows, so a field that a row does not have
is null there: nulls are left out of structs, at any depth. They stay in lists, in columns, and in JSON columns.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cache.errors import DataError
from stages.data.json_files import parse_json
from stages.data.source_row import SourceRow, first_line

Conversion = Callable[[Any], Any]
JSON_EXTENSION = "arrow.json"
ARROW_FILE_MAGIC = b"ARROW1"
ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def read_arrow(path: Path, suffix: str) -> Iterator[SourceRow]:
    """Rows of a .parquet or .arrow file; raises `DataError` when it is damaged."""
    import pyarrow as pa

    number = 0
    try:
        for row in arrow_rows(_batches(path, suffix), path.name):
            yield row
            number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a readable {suffix[1:]} file ({first_line(error)}, after row {number})."
        ) from error


def arrow_rows(batches: Iterable[Any], place: str) -> Iterator[SourceRow]:
    """Rows of record batches (or tables); `place` and the number of the row are its location."""
    number = 0
    for batch in batches:
        for value in _values(batch):
            number += 1
            if isinstance(value, dict):
                yield SourceRow(f"{place}#{number}", value)
            else:
                yield SourceRow(f"{place}#{number}", None, str(value))


def _batches(path: Path, suffix: str) -> Iterable[Any]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    if suffix == ".parquet":
        return parquet.ParquetFile(path).iter_batches(batch_size=1024)
    source = pa.memory_map(str(path))
    if source.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC:
        reader = pa.ipc.open_file(source)
        return (reader.get_batch(index) for index in range(reader.num_record_batches))
    # The stream format, which `datasets` writes. Without this check, one cut between two batches reads as a shorter table.
    source.seek(max(0, source.size() - len(ARROW_STREAM_END)))
    if source.read() != ARROW_STREAM_END:
        raise pa.ArrowInvalid("neither an Arrow file nor a complete Arrow stream")
    source.seek(0)
    return pa.ipc.open_stream(source)


def _values(batch: Any) -> list[dict[str, Any] | ValueError]:
    """The rows of a batch as dicts, with an error in place of a row with a text that is not UTF-8 or not JSON."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [ValueError(f"not UTF-8 at byte {error.start} of a text")]
        return [value for row in range(batch.num_rows) for value in _values(batch.slice(row, 1))]
    found = {field.name: _conversion(field.type) for field in batch.schema}
    conversions = {name: convert for name, convert in found.items() if convert is not None}
    return [_converted(row, conversions) for row in rows] if conversions else rows


def _converted(row: dict[str, Any], conversions: dict[str, Conversion]) -> dict[str, Any] | ValueError:
    try:
        return {**row, **{name: convert(row[name]) for name, convert in conversions.items()}}
    except ValueError as error:
        return error


def _conversion(kind: Any) -> Conversion | None:
    """The function from a value of this Arrow type to the value that JSON would have; None where they are equal."""
    import pyarrow as pa

    # By name: `datasets` 5 writes columns of uneven type so, and a pyarrow before 19 has no class for it.
    if getattr(kind, "extension_name", None) == JSON_EXTENSION:
        return lambda value: value if value is None else parse_json(value.encode())
    if pa.types.is_dictionary(kind):
        return _conversion(kind.value_type)
    if pa.types.is_struct(kind):
        return _struct_conversion({field.name: _conversion(field.type) for field in kind})
    if pa.types.is_map(kind):
        convert = _conversion(kind.item_type) or _unchanged
        return lambda pairs: pairs if pairs is None else {key: convert(value) for key, value in pairs}
    if hasattr(kind, "value_type"):  # every kind of list
        element = _conversion(kind.value_type)
        return element and (lambda values: values if values is None else [*map(element, values)])
    return None


def _struct_conversion(fields: dict[str, Conversion | None]) -> Conversion:
    def convert(value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        return {name: (fields[name] or _unchanged)(part) for name, part in value.items() if part is not None}

    return convert


def _unchanged(value: Any) -> Any:
    return value
