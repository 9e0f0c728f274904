"""Source rows of local files and hub datasets, with their locations.

In: `data.path` and the settings of a hub dataset. Out: a `SourceRow` for every row, in order.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from cache.errors import DataError, MachineError, UsageError
from cache.files import sha256_file
from stages.data.arrow_files import arrow_rows, read_arrow
from stages.data.folders import EXCEL_SUFFIX, FILE_SUFFIXES, folder_files, suffix_of
from stages.data.json_files import read_json, read_jsonl
from stages.data.source_row import SourceRow, first_line
from stages.data.table_files import DELIMITERS, read_csv, read_excel
from stages.settings.data import DataSettings

ONE_FILE_SUFFIXES = (*FILE_SUFFIXES, EXCEL_SUFFIX)


def source_identity(data: DataSettings) -> dict[str, Any]:
    """The identity of the source's content: the sha256 of each file, or the resolved revision of a hub dataset."""
    files = local_files(data)
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
    files = local_files(data)
    rows = _read_hub(data) if files is None else (row for path in files for row in _read_file(path))
    return islice(rows, data.max_samples)


def files_note(data: DataSettings) -> str | None:
    """What of a local folder is read and what is not, where that is not all of it."""
    path = Path(data.path).expanduser()
    if not path.is_dir():
        return None
    found = folder_files(path, data)
    if not found.other_splits and not found.left_out:
        return None
    others = f"; other splits: {', '.join(found.other_splits)}" if found.other_splits else ""
    unread = f"; not read: {', '.join(file.name for file in found.left_out)}" if found.left_out else ""
    return f"{path}: the split {data.split} has {len(found.files)} file{'s' * (len(found.files) != 1)}{others}{unread}"


def local_files(data: DataSettings) -> list[Path] | None:
    """The file that `data.path` names, or the files of a split of the folder it names, or None for a hub dataset."""
    path = Path(data.path).expanduser()
    if path.exists() and data.revision is not None:
        raise UsageError(f"data.revision={data.revision}: {path} is local. Leave data.revision out.")
    if path.is_file():
        if suffix_of(path) not in ONE_FILE_SUFFIXES:
            raise DataError(
                f"{path}: unknown file type. Expected one of {', '.join(ONE_FILE_SUFFIXES)} (JSON and CSV also as .gz)."
            )
        for key in ("config", "split"):
            if getattr(data, key) != getattr(DataSettings(), key):
                raise UsageError(
                    f"data.{key}={getattr(data, key)}: {path} is one file, which has no {key}. Leave data.{key} out."
                )
        return [path]
    if path.is_dir():
        return folder_files(path, data).files
    if (
        data.path.startswith((".", "/", "~"))
        or data.path.count("/") > 1
        or suffix_of(path) in ONE_FILE_SUFFIXES
    ):
        raise DataError(f"No such file: {data.path}. Give a file or a hub dataset with --set data.path=PATH.")
    return None


def _read_file(path: Path) -> Iterator[SourceRow]:
    suffix = suffix_of(path)
    if suffix == ".jsonl":
        return read_jsonl(path)
    if suffix in DELIMITERS:
        return read_csv(path, suffix)
    if suffix == EXCEL_SUFFIX:
        return read_excel(path)
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
