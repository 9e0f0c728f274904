"""The data files of a local folder for one split, as `datasets` chooses them.

Three kinds of folders: a clone of a hub dataset, or any folder of data files (`load_dataset`: the card's `configs`, else
names of files and folders that name a split); a folder of `save_to_disk` for one dataset, or for several
(`load_from_disk`).
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cache.errors import DataError, UsageError
from stages.data.source_row import first_line
from stages.settings.data import DataSettings

FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".tsv")
EXCEL_SUFFIX = ".xlsx"
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"
DEFAULT_SPLIT = DataSettings().split


@dataclass(frozen=True)
class FolderFiles:
    """The files of the split that is read, the names of the other splits, and the data files that belong to no split."""

    files: list[Path]
    other_splits: list[str]
    left_out: list[Path]


def suffix_of(path: Path) -> str:
    """The ending of a data file in small letters, without `.gz`."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def folder_files(folder: Path, data: DataSettings) -> FolderFiles:
    """The files of `data.split` in `folder`, in order; raises `AlignError` where there are none."""
    if (folder / SAVED_DATASET).is_file():
        if data.split != DEFAULT_SPLIT:
            raise UsageError(
                f"data.split={data.split}: {folder} holds one saved dataset, which has no splits. Leave data.split out."
            )
        return FolderFiles(_saved_files(folder), [], [])
    if (folder / SAVED_SPLITS).is_file():
        names = [str(name) for name in _object(folder / SAVED_SPLITS).get("splits", [])]
        return FolderFiles(
            _saved_files(folder / _one_of(data.split, names, folder)), _others(data, names), []
        )
    splits = _splits(folder, data)
    files = splits[_one_of(data.split, list(splits), folder)]
    in_splits = {file for own in splits.values() for file in own}
    return FolderFiles(files, _others(data, splits), sorted(_data_files(folder) - in_splits))


def _data_files(folder: Path) -> set[Path]:
    """Every file in `folder` that could hold rows; hidden files, and what `datasets` writes about a dataset, cannot."""
    from datasets.data_files import FILES_TO_IGNORE

    return {
        path
        for path in folder.rglob("*")
        if suffix_of(path) in FILE_SUFFIXES
        and path.is_file()
        and path.name not in FILES_TO_IGNORE
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def _others(data: DataSettings, names: Mapping[str, list[Path]] | list[str]) -> list[str]:
    return [name for name in names if name != data.split]


def _one_of(split: str, names: list[str], folder: Path) -> str:
    if split not in names:
        raise UsageError(
            f"data.split={split}: {folder} has no such split. It has {', '.join(names)}. Choose with --set data.split=NAME."
        )
    return split


def _saved_files(folder: Path) -> list[Path]:
    """The files that `load_from_disk` reads, in the order of state.json."""
    try:
        return [folder / entry["filename"] for entry in _object(folder / SAVED_DATASET)["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{folder / SAVED_DATASET} names no data files. Write the folder again with save_to_disk."
        ) from error


def _object(path: Path) -> dict:
    if not path.is_file():
        raise DataError(f"{path} is missing. Write the folder again with save_to_disk.")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}). Write the folder again with save_to_disk.") from error
    return value if isinstance(value, dict) else {}


def _splits(folder: Path, data: DataSettings) -> dict[str, list[Path]]:
    """The files of each split of a folder of data files, in order."""
    import datasets

    try:
        with tempfile.TemporaryDirectory() as cache:  # a builder makes a folder for what it would convert
            builder = datasets.load_dataset_builder(str(folder), data.config, cache_dir=cache)
            found = dict(builder.config.data_files or {})
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds no data file. Expected files ending in {', '.join(FILE_SUFFIXES)}."
        ) from error
    except Exception as error:
        # `datasets` parses the card and other files of the folder, which may hold anything.
        raise DataError(
            f"{folder} cannot be read as a dataset ({first_line(error)}). Choose with --set data.config=NAME or data.split=NAME, or give one of its files with --set data.path=PATH."
        ) from error
    # `datasets` resolves links; the paths of this folder are the ones a person knows.
    root = folder.resolve()
    splits = {}
    for split, paths in found.items():
        own = [path for path in map(Path, paths) if suffix_of(path) in FILE_SUFFIXES and path.is_file()]
        if not own:
            raise DataError(
                f"{folder}: the split {split} has no data file but {Path(paths[0]).name}. Expected files ending in {', '.join(FILE_SUFFIXES)}."
            )
        splits[str(split)] = [
            folder / path.relative_to(root) if path.is_relative_to(root) else path for path in own
        ]
    return splits
