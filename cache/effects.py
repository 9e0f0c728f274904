"""Every change that `cache` makes to a disk, one function each: nothing else in this folder asks the operating system for one.

Tests run each change in their own way (`run_by`): they fail the n-th, or end the process there.
"""

import errno
import fcntl
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Runner = Callable[..., Any]

_runner: Runner | None = None


@contextmanager
def run_by(runner: Runner) -> Iterator[None]:
    """Meanwhile `runner(function, *arguments)` is called in place of each of the functions below."""
    global _runner
    before, _runner = _runner, runner
    try:
        yield
    finally:
        _runner = before


def _effect(function: Callable[P, T]) -> Callable[P, T]:
    @wraps(function)
    def run(*arguments: P.args, **named: P.kwargs) -> T:
        return function(*arguments, **named) if _runner is None else _runner(function, *arguments, **named)

    return run


@_effect
def make_folder(path: Path) -> None:
    """Make one folder; its parent is there."""
    with suppress(FileExistsError):
        path.mkdir()


@_effect
def create(path: Path) -> int:
    """Make an empty file, which must not be there; its handle, for reading and writing."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


@_effect
def open_or_create(path: Path, more: int = 0) -> int:
    """A handle of a file, for reading and writing, made if it is not there; `more` are further flags of `os.open`."""
    return os.open(path, os.O_RDWR | os.O_CREAT | more, 0o666)


@_effect
def write(handle: int, content: Any) -> None:
    """Write all bytes of `content` at the position of `handle`."""
    rest = memoryview(content).cast("B")
    while rest:
        rest = rest[os.write(handle, rest) :]


@_effect
def truncate(handle: int, size: int) -> None:
    """Cut an open file to `size` bytes."""
    os.ftruncate(handle, size)


@_effect
def sync_file(path: Path) -> None:
    """Put the content of a file on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@_effect
def sync_folder(path: Path) -> None:
    """Put the names of a folder on the disk: what was made in it, renamed and removed."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no such request for folders
            raise
    finally:
        os.close(handle)


@_effect
def rename(source: Path, target: Path) -> None:
    """Give a file or folder another name on its disk; a file under that name is replaced, a folder with files is not."""
    os.rename(source, target)


@_effect
def set_mode(path: Path, mode: int) -> None:
    """Set the permissions of a file."""
    path.chmod(mode)


@_effect
def touch(path: Path) -> None:
    """Set the time of modification to now."""
    os.utime(path)


@_effect
def lock(handle: int) -> None:
    """Lock an open file until it is closed; raises `BlockingIOError` where another process has."""
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@_effect
def remove(path: Path) -> None:
    """Remove a file, if it is there."""
    path.unlink(missing_ok=True)


@_effect
def remove_tree(folder: Path) -> None:
    """Remove a folder and all that is in it, if it is there."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:  # also of a file in it, which another process removed
        shutil.rmtree(folder, ignore_errors=True)


def make_folders(path: Path) -> None:
    """Make a folder and its parents, durably; raises `OSError` where a file is in the way."""
    if path.is_dir():
        return
    make_folders(path.parent)
    make_folder(path)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    sync_folder(path.parent)


class Sink(io.RawIOBase):
    """A file of Python over an open handle, for what writes into those alone; closing it leaves the handle open."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, content: Any) -> int:
        """Write all of `content`."""
        write(self._handle, content)
        return len(content)


@contextmanager
def open_for_writing(path: Path) -> Iterator[Sink]:
    """A file to write from its beginning; what it held is gone."""
    handle = open_or_create(path, os.O_TRUNC)
    try:
        yield Sink(handle)
    finally:
        os.close(handle)
