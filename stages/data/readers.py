"""Source rows: local JSON, JSONL, Parquet and Arrow files, and hub datasets, with their locations.

JSONL is read line by line here, so that memory stays flat and every message can say file and line;
`datasets` would fail the whole file without a row number and turn date-like text into timestamps.
"""

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cache.errors import DataError, MachineError
from cache.files import sha256_file
from stages.settings.data import DataSettings

FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ARROW_FILE_MAGIC = b"ARROW1"
ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


class BadRow(ValueError):
    """A source row that cannot be read as its format says; `data.on_bad_row` decides what happens."""


class Flagged(BadRow):
    """A row that is dropped under a reason of its own and listed, but never stops the stage."""

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


@dataclass(frozen=True)
class SourceRow:
    """One row of the source, or the reason why it could not be read."""

    location: str
    value: dict[str, Any] | None
    problem: str | None = None
    source: str = ""


def source_identity(data: DataSettings) -> dict[str, Any]:
    """What identifies the source's content: a file's sha256, or a hub dataset's resolved revision."""
    files = _local_files(data)
    if files is not None:
        return {"sha256": [sha256_file(path) for path in files]}
    return {
        "path": data.path,
        "config": data.config,
        "split": data.split,
        "revision": _hub_builder(data).hash,
    }


def read_source(data: DataSettings) -> Iterator[SourceRow]:
    """Yield source rows in order, at most `data.max_samples`; unreadable ones carry their problem."""
    files = _local_files(data)
    rows = _read_hub(data) if files is None else (row for path in files for row in _read_file(path))
    return islice(rows, data.max_samples)


def _local_files(data: DataSettings) -> list[Path] | None:
    """The file that `data.path` names, or the data files of the folder it names, or None for a hub dataset."""
    path = Path(data.path).expanduser()
    if path.is_file():
        if _suffix(path) not in FILE_SUFFIXES:
            raise DataError(
                f"{path}: unknown file type. Expected one of {', '.join(FILE_SUFFIXES)} (JSON also as .gz)."
            )
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file) in FILE_SUFFIXES)
        if not files:
            raise DataError(
                f"{path} holds no data file. Expected files ending in {', '.join(FILE_SUFFIXES)}."
            )
        return files
    if data.path.startswith((".", "/", "~")) or data.path.count("/") > 1 or _suffix(path) in FILE_SUFFIXES:
        raise DataError(f"No such file: {data.path}. Give a file or a hub dataset with --set data.path=PATH.")
    return None


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _read_file(path: Path) -> Iterator[SourceRow]:
    suffix = _suffix(path)
    if suffix == ".jsonl":
        return _read_jsonl(path)
    return _read_json(path) if suffix == ".json" else _read_arrow(path, suffix)


@contextmanager
def _open(path: Path):
    """The bytes of a file, unpacked; a damaged .gz is a `DataError`."""
    if path.suffix != ".gz":
        with open(path, "rb") as handle:
            yield handle
        return
    try:
        with gzip.open(path, "rb") as handle:
            yield handle
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} is not a whole .gz file ({_first_line(error)}). Copy or download it again."
        ) from error


def _read_jsonl(path: Path) -> Iterator[SourceRow]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            location = f"{path.name}:{number}"
            text = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if not text.strip():
                continue
            try:
                value = _parse(text)
            except ValueError as error:
                yield SourceRow(location, None, str(error))
                continue
            if isinstance(value, dict):
                yield SourceRow(location, value)
            else:
                yield SourceRow(location, None, f"expected a JSON object, found {type(value).__name__}")


def _read_json(path: Path) -> Iterator[SourceRow]:
    with _open(path) as handle:
        content = handle.read().removeprefix(BYTE_ORDER_MARK)
    try:
        value = _parse(content)
    except ValueError as error:
        raise DataError(
            f"{path}: {error}. Expected a JSON array of objects; one object a line goes in a .jsonl file."
        ) from error
    if isinstance(value, dict) and value and all(isinstance(entry, dict) for entry in value.values()):
        # An object of objects, as ODPO's: each key is a row's own.
        value = [{"key": key, **entry} for key, entry in value.items()]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a JSON array of objects, found {type(value).__name__}.")
    for number, row in enumerate(value, start=1):
        location = f"{path.name}#{number}"
        if isinstance(row, dict):
            yield SourceRow(location, row)
        else:
            yield SourceRow(location, None, f"expected an object, found {type(row).__name__}")


def _parse(content: bytes) -> Any:
    """JSON with duplicate keys, NaN, infinities and invalid UTF-8 refused (ValueError)."""
    try:
        text = content.decode("utf-8")
        value = _PLAIN.decode(text)
        # Every key is followed by a colon. As many keys as there are such places: none appeared twice.
        return value if _num_keys(value) == len(_KEY.findall(text)) else _UNIQUE.decode(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _num_keys(value: Any) -> int:
    count, waiting = 0, [value]
    for part in waiting:  # grows meanwhile
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


def _read_arrow(path: Path, suffix: str) -> Iterator[SourceRow]:
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
            f"{path} is not a readable {suffix[1:]} file ({_first_line(error)}, after row {number})."
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
    # The stream format, which `datasets` writes. Cut between two batches it would pass for a shorter table.
    source.seek(max(0, source.size() - len(ARROW_STREAM_END)))
    if source.read() != ARROW_STREAM_END:
        raise pa.ArrowInvalid("neither an Arrow file nor a whole Arrow stream")
    source.seek(0)
    return pa.ipc.open_stream(source)


def _values(batch: Any) -> list[dict[str, Any] | ValueError]:
    """The rows of a batch as dicts; in place of a row whose text is not UTF-8, the error."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [ValueError(f"not UTF-8 at byte {error.start} of a text")]
        return [value for row in range(batch.num_rows) for value in _values(batch.slice(row, 1))]


def _hub_builder(data: DataSettings):
    import datasets

    try:
        return datasets.load_dataset_builder(data.path, data.config, revision=data.revision)
    except (ConnectionError, OSError, ValueError) as error:
        raise MachineError(
            f"Dataset {data.path!r} is neither a local file nor reachable on the hub ({_first_line(error)}). "
            f"Check the name and the network, or give a local file with --set data.path=PATH."
        ) from error


def _read_hub(data: DataSettings) -> Iterator[SourceRow]:
    import datasets
    from datasets.exceptions import DatasetsError

    _hub_builder(data)
    try:
        dataset = datasets.load_dataset(data.path, data.config, split=data.split, revision=data.revision)
    except ValueError as error:
        raise DataError(
            f"Dataset {data.path!r}: {_first_line(error)}. Choose with --set data.split=NAME or data.config=NAME."
        ) from error
    except DatasetsError as error:
        raise DataError(
            f"Dataset {data.path!r} cannot be read ({_first_line(error.__cause__ or error)}). "
            f"Give one of its files with --set data.path=PATH, and errors name the row."
        ) from error
    for number, row in enumerate(dataset, start=1):
        yield SourceRow(f"{data.path}[{data.split}]#{number}", dict(row))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
