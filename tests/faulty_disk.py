"""Disks on which the n-th change goes wrong: it fails, the process dies in it, or the power does.

Each is a runner for `cache.effects.run_by`. A write that goes wrong has written half of its bytes.
"""

import os
import stat
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from cache.checked import CHECKED

# The changes that need space, and those that open a file.
GROWING = {"make_folder", "create", "open_or_create", "write"}
OPENING = {"create", "open_or_create", "sync_file", "sync_folder"}


class Disk:
    """Counts changes, and lets `fault` happen at the n-th; without n, none. Functions named in `skipped` do nothing."""

    def __init__(self, n: int | None = None, skipped: Collection[str] = ()) -> None:
        self.n, self.count, self.skipped = n, 0, skipped

    @property
    def was_reached(self) -> bool:
        return self.n is not None and self.count >= self.n

    def __call__(self, function: Callable, *arguments: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return function(*arguments)  # an owner that touches its file
        if function.__name__ in self.skipped:
            return None
        self.count += 1
        if self.n is not None and self.count >= self.n:
            return self.fault(function, arguments)
        return self.work(function, arguments)

    def work(self, function: Callable, arguments: tuple) -> Any:
        return function(*arguments)

    def fault(self, function: Callable, arguments: tuple) -> Any:
        raise NotImplementedError


def half(function: Callable, arguments: tuple) -> None:
    """The half of a write; nothing of any other change."""
    if function.__name__ == "write":
        handle, content = arguments
        function(handle, memoryview(content).cast("B")[: memoryview(content).nbytes // 2])


class FailingDisk(Disk):
    """The n-th change fails; later ones of the kinds in `lasting` too."""

    def __init__(self, n: int, number: int, lasting: Collection[str] = ()) -> None:
        super().__init__(n)
        self.number, self.lasting, self.failed = number, lasting, set()

    def fault(self, function: Callable, arguments: tuple) -> Any:
        if self.count > self.n and function.__name__ not in self.lasting:
            return function(*arguments)
        if not is_note(arguments):
            self.failed.add(function.__name__)
        half(function, arguments)
        raise OSError(self.number, os.strerror(self.number))


def is_note(arguments: tuple) -> bool:
    """Whether a change is about a note of what was checked, without which everything is checked again."""
    where = [
        os.readlink(f"/proc/self/fd/{one}") if isinstance(one, int) else str(one) for one in arguments[:1]
    ]
    return any(CHECKED in one for one in where)


class KillingDisk(Disk):
    """The process ends in the n-th change, with exit code 9."""

    def fault(self, function: Callable, arguments: tuple) -> Any:
        half(function, arguments)
        os._exit(9)


class PowerLoss(BaseException):
    """No change reaches the disk any more."""


class LosingDisk(Disk):
    """At the n-th change the power fails; `after_loss` builds what a disk may have then, by what was synced.

    It knows of every file the bytes that it had when it was last synced, and of every folder the names.
    """

    def __init__(self, n: int | None, root: Path, skipped: Collection[str] = ()) -> None:
        super().__init__(n, skipped)
        self.root = root
        self.bytes: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.pinned: dict[int, int] = {}  # handles, so that no number of a file is given to another
        for path in (root, *root.rglob("*")):
            self._synced(path)

    def __enter__(self) -> "LosingDisk":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.pinned.values():
            os.close(handle)

    def work(self, function: Callable, arguments: tuple) -> Any:
        result = function(*arguments)
        if function.__name__ in ("sync_file", "sync_folder"):
            self._synced(arguments[0])
        return result

    def fault(self, function: Callable, arguments: tuple) -> Any:
        if self.count == self.n:
            half(function, arguments)
        raise PowerLoss

    def after_loss(self, target: Path, names_are_kept: bool) -> None:
        """What is not synced is lost; where `names_are_kept`, only bytes are."""
        if names_are_kept:
            self._copy_names(self.root, target)
        else:
            self._build(self._pin(self.root), target)

    def _synced(self, path: Path) -> None:
        number = self._pin(path)
        if path.is_dir():
            self.names[number] = {entry.name: self._pin(entry) for entry in path.iterdir()}
        else:
            self.bytes[number] = path.read_bytes()

    def _pin(self, path: Path) -> int:
        handle = os.open(path, os.O_RDONLY)
        number = os.fstat(handle).st_ino
        if number in self.pinned:
            os.close(handle)
        self.pinned.setdefault(number, handle)
        return number

    def _build(self, number: int, target: Path) -> None:
        if not stat.S_ISDIR(os.fstat(self.pinned[number]).st_mode):
            target.write_bytes(self.bytes.get(number, b""))
            return
        target.mkdir()
        for name, entry in self.names.get(number, {}).items():
            self._build(entry, target / name)

    def _copy_names(self, source: Path, target: Path) -> None:
        if not source.is_dir():
            target.write_bytes(self.bytes.get(source.stat().st_ino, b""))
            return
        target.mkdir()
        for entry in source.iterdir():
            self._copy_names(entry, target / entry.name)
