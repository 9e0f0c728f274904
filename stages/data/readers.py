"""Source rows of local files and hub datasets, with their locations.

In: `data.path` and the settings of a hub dataset. Out: a `SourceRow` for every row, in order.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from cache.errors import DataError, MachineError
from cache.files import sha256_file
from stages.data.arrow_files import arrow_rows, read_arrow
from stages.data.json_files import read_json, read_jsonl
from stages.data.source_row import SourceRow, first_line
from stages.settings.data import DataSettings

FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")


def source_identity(data: DataSettings) -> dict[str, Any]:
    """The identity of the source's content: the sha256 of each file, or the resolved revision of a hub dataset."""
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
    """Yield source rows in order, at most `data.max_samples`; an unreadable row carries its problem."""
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
        return read_jsonl(path)
    return read_json(path) if suffix == ".json" else read_arrow(path, suffix)


def _hub_builder(data: DataSettings):
    import datasets

    try:
        return datasets.load_dataset_builder(data.path, data.config, revision=data.revision)
    except (ConnectionError, OSError, ValueError) as error:
        raise MachineError(
            f"Dataset {data.path!r} is neither a local file nor reachable on the hub ({first_line(error)}). "
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
            f"Dataset {data.path!r}: {first_line(error)}. Choose with --set data.split=NAME or data.config=NAME."
        ) from error
    except DatasetsError as error:
        raise DataError(
            f"Dataset {data.path!r} cannot be read ({first_line(error.__cause__ or error)}). "
            f"Give one of its files with --set data.path=PATH; then errors name the row."
        ) from error
    yield from arrow_rows(dataset_batches(dataset), f"{data.path}[{data.split}]")


def dataset_batches(dataset: Any) -> Iterator[Any]:
    """The rows of a `datasets.Dataset` as Arrow tables."""
    return dataset.with_format("arrow").iter(batch_size=1024)
