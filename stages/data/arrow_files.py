"""Rows of Parquet files and of Arrow files (file or stream format), with one batch in memory at a time."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cache.errors import DataError
from stages.data.source_row import SourceRow, first_line

ARROW_FILE_MAGIC = b"ARROW1"
ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def read_arrow(path: Path, suffix: str) -> Iterator[SourceRow]:
    """Rows of a .parquet or .arrow file; raises `DataError` when it is damaged."""
    import pyarrow as pa

    number = 0
    try:
        for batch in _batches(path, suffix):
            for value in _values(batch):
                number += 1
                location = f"{path.name}#{number}"
                if isinstance(value, dict):
                    yield SourceRow(location, value)
                else:
                    yield SourceRow(location, None, str(value))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a readable {suffix[1:]} file ({first_line(error)}, after row {number})."
        ) from error


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
    """The rows of a batch as dicts, with an error in place of a row whose text is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [ValueError(f"not UTF-8 at byte {error.start} of a text")]
        return [value for row in range(batch.num_rows) for value in _values(batch.slice(row, 1))]
