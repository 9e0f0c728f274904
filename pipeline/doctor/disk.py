"""The disk of the store: room, kind of file system, and whether what the store relies on works there.

Writes two small files into a temporary folder there and removes it again.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cache.locations import is_url
from pipeline.doctor.finding import Finding

GIB = 1 << 30
LITTLE, TOO_LITTLE = 20 * GIB, GIB


def disk(store: str) -> Iterator[Finding]:
    """The findings for the folder of the store, or for the nearest folder above it that exists."""
    wanted = _folder(store)
    folder = next(path for path in (wanted, *wanted.parents) if path.is_dir())
    kept = f"{store} is mirrored in {wanted}, " if is_url(store) else f"{wanted}, "
    free = shutil.disk_usage(folder).free
    state = "problem" if free < TOO_LITTLE else "note" if free < LITTLE else "ok"
    found = f"{kept}{free / GIB:,.0f} GiB free on {file_system(folder)}"
    yield Finding("store", "disk", state, found, "" if state == "ok" else "align gc, or --store DIR")
    yield from _tried(folder)


def _folder(store: str) -> Path:
    if not is_url(store):
        return Path(store).absolute()
    from cache.mirror import mirror_of

    return mirror_of(store).absolute()


def file_system(folder: Path, mounts: str = "/proc/mounts") -> str:
    """The kind of file system of a folder; `an unknown file system` where the system does not list it."""
    with suppress(OSError):
        listed = [line.split()[1:3] for line in Path(mounts).read_text().splitlines()]
        above = [
            (point, kind)
            for point, kind in listed
            if folder.resolve().is_relative_to(point.replace("\\040", " "))
        ]
        if above:
            return max(above, key=lambda entry: len(entry[0]))[1]
    return "an unknown file system"


def _tried(folder: Path) -> Iterator[Finding]:
    advice = "choose another folder with --store DIR"
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp-doctor-", dir=folder) as made:
            _write_and_rename(Path(made))
            yield Finding("store", "write", "ok", "write, fsync and rename work")
            if _locks_work(Path(made) / "lock"):
                yield Finding("store", "locks", "ok", "a lock keeps other processes out")
            else:
                what = "locks do nothing: two processes are told apart by the time of their last sign of life"
                yield Finding("store", "locks", "note", what, "run one align command at a time on a store")
    except OSError as error:
        yield Finding("store", "write", "problem", f"{folder}: {error.strerror or error}", advice)


def _write_and_rename(folder: Path) -> None:
    path = folder / "file"
    with path.open("wb") as file:
        file.write(b"align")
        file.flush()
        os.fsync(file.fileno())
    path.rename(folder / "renamed")
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _locks_work(path: Path) -> bool:
    """Whether a second open file of the same name is kept out of a lock, as another process is."""
    with path.open("wb") as first, path.open("wb") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
