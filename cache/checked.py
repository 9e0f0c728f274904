"""Files that need no second hashing: they have the size and times they had when their content was last checked.

In: a folder and the sha256 of its files.  Out: the first file that is missing or differs. The check reads only the files
whose size, time of modification, time of change or inode differ from those noted in `.checked.json`. The note is no proof
of its own: without it, or where it cannot be written, every file is read.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cache.errors import CorruptError, MachineError, StaleError
from cache.files import read_json, sha256_file, write_json

CHECKED = ".checked.json"


def unchanged_files(folder: Path, sha256: Mapping[str, str]) -> set[str]:
    """The names of those files that are as they were when they were last found to have this content."""
    noted = _noted(folder)
    return {
        name
        for name, expected in sha256.items()
        if name in noted and (folder / name).is_file() and noted[name] == _note(folder / name, expected)
    }


def check_files(folder: Path, sha256: Mapping[str, str], repair: str) -> None:
    """Compare the files of `folder`, a sha256 by name, with what they were; raises `StaleError` or `CorruptError`."""
    unchanged = unchanged_files(folder, sha256)
    for name, expected in sha256.items():
        path = folder / name
        if not path.is_file():
            raise StaleError(f"{path} is missing. {repair}")
        if name not in unchanged and sha256_file(path) != expected:
            raise CorruptError(f"{path} is damaged: its sha256 is not the one that was written. {repair}")
    note_checked(folder, sha256)


def note_checked(folder: Path, sha256: Mapping[str, str]) -> None:
    """Note that the files of `folder` have this content now."""
    notes = {name: _note(folder / name, expected) for name, expected in sha256.items()}
    if notes != _noted(folder):
        with suppress(MachineError):  # a store that may only be read
            write_json(folder / CHECKED, notes)


def _noted(folder: Path) -> dict[str, Any]:
    try:
        noted = read_json(folder / CHECKED)
    except (OSError, CorruptError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _note(path: Path, sha256: str) -> list[int | str]:
    # A program can set the time of modification back, but not the time of change.
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, sha256]
