"""Answers by key, each durable as soon as it is there: what was paid for is not asked again.

    <folder>/<machine>.<process>.<digits>.jsonl     one line for each answer: key, value, sha256

Every writer appends to a file of its own, so no lock is needed. Appending and not writing whole files, because an answer of a
paid service must not wait for others. A killed process may leave a cut line at the end of its file, which is left out; any
other line that differs from what was written is a `CorruptError`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache import effects
from cache.errors import CorruptError
from cache.files import disk_errors_named, with_digest
from cache.fingerprint import canonical_json
from cache.ownership import temporary_suffix

SUFFIX = ".jsonl"
DIGEST = "sha256"


class KeptAnswers:
    """The answers in a folder, opened for reading and adding."""

    def __init__(self, folder: Path) -> None:
        """Read every file; raises `CorruptError` for a line that was changed."""
        self.folder = folder
        self._own: Path | None = None
        self._values: dict[str, Any] = {}
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            self._read(path)

    def __contains__(self, key: str) -> bool:
        """Whether there is an answer under this key."""
        return key in self._values

    def get(self, key: str) -> Any:
        """The answer under this key, as JSON."""
        return self._values[key]

    def add(self, values: Mapping[str, Any]) -> None:
        """Append answers by key; they are on disk when this returns."""
        if not values:
            return
        lines = [
            canonical_json(with_digest({"key": key, "value": value}, DIGEST)) + b"\n"
            for key, value in values.items()
        ]
        with disk_errors_named(self.folder):
            own, self._own = self._own, None  # behind half a line the next one could not be read
            path = own or self.folder / f"{temporary_suffix()}{SUFFIX}"
            effects.make_folders(self.folder)
            _append(path, b"".join(lines))
            if own is None:
                effects.sync_folder(self.folder)
            self._own = path
        self._values.update(values)

    def _read(self, path: Path) -> None:
        *lines, cut = path.read_bytes().split(b"\n")  # a whole line ends with a line feed
        del cut
        for number, line in enumerate(lines, 1):
            entry = _entry(line)
            if entry is None:
                raise CorruptError(
                    f"{path}:{number} was changed after it was written. Delete that line or file: only its answers are "
                    f"asked again."
                )
            self._values[entry["key"]] = entry["value"]


def _append(path: Path, content: bytes) -> None:
    """Append `content` durably; an `OSError` may leave a part of it."""
    handle = effects.open_or_create(path, os.O_APPEND)
    try:
        effects.write(handle, content)
        effects.sync_file(path)
    finally:
        os.close(handle)


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
        content = {"key": entry["key"], "value": entry["value"]}
        return content if with_digest(content, DIGEST) == entry else None
    except (ValueError, TypeError, KeyError):
        return None
