"""Who is writing a folder or a temporary file: one process at a time, and what a killed one left is removed.

An owner holds an operating system's lock (`flock`), which ends with its process, however that ends. On file systems
whose locks do not reach other machines, an owner is alive as long as it touches its file: every `BEAT_SECONDS`.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cache import effects
from cache.errors import BusyError

OWNER = "owner.json"
BEAT_SECONDS = 10.0
# An owner on another machine is taken for dead after this time without a touch.
SILENT_SECONDS = 45.0
# What carries no owner's lock and no name of this machine is left for this long.
OLD_SECONDS = 86_400.0


class Claim:
    """The right to write into a folder, until `release` or the end of this process."""

    def __init__(self, path: Path, handle: int) -> None:
        """`handle` is that of the locked file at `path`."""
        self._path, self._handle = path, handle
        self._released = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Let other processes write into the folder; does nothing the second time."""
        if self._released.is_set():
            return
        self._released.set()
        with suppress(OSError):  # a file that nobody has locked is in nobody's way
            if _is_at(self._handle, self._path):  # the folder may be gone, and made again by the next owner
                effects.remove(self._path)
        os.close(self._handle)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with suppress(OSError):  # closed in this moment, or a full disk
                effects.touch(self._path)


def claim(folder: Path, log: Callable[[str], None] = lambda line: None) -> Claim:
    """Make this process the only one that writes into `folder`, which is created; raises `BusyError` for another one.

    `log` is told before the wait for an owner on another machine.
    """
    path = folder / OWNER
    while True:
        effects.make_folders(folder)
        handle = effects.open_or_create(path)
        try:
            if not _lock(handle) or _is_touched(path, log):
                raise BusyError(_who(path))
            if _is_at(handle, path):
                _write_record(handle)
                return Claim(path, handle)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the owner before removed the folder in this moment


def claim_temporary(path: Path) -> tuple[Path, Claim]:
    """A folder beside `path` for this process alone, named after it, and the claim; those of killed processes are removed."""
    remove_abandoned(path.parent, f"{path.name}.")
    folder = path.with_name(f"{path.name}.{temporary_suffix()}")
    try:
        return folder, claim(folder)
    except OSError:
        with suppress(OSError):
            effects.remove_tree(folder)
        raise


def is_claimed(folder: Path) -> bool:
    """Whether a living process of this machine writes into `folder`."""
    try:
        handle = os.open(folder / OWNER, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _lock(handle)
    finally:
        os.close(handle)


def temporary_suffix() -> str:
    """The end of a temporary name that no other process uses: machine, process, random digits."""
    # Process ids alone can be equal in containers and on machines that share a store.
    return f"{host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"


def lock_temporary(path: Path) -> int:
    """Create a temporary file and lock it; the handle, to be closed after the file is renamed or removed."""
    handle = effects.create(path)
    _lock(handle)
    return handle


def remove_abandoned(folder: Path, prefix: str) -> None:
    """Remove the temporary files and folders in `folder` whose names begin with `prefix` and whose owners are dead."""
    for path in folder.glob("*"):
        with suppress(OSError):  # removed by another process
            if not path.name.startswith(prefix) or not _is_abandoned(path):
                continue
            if path.is_dir():
                effects.remove_tree(path)
            else:
                effects.remove(path)


def host() -> str:
    """The name of this machine, of letters, digits, `-` and `_` alone."""
    name = socket.gethostname()
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name) or "localhost"


def _is_abandoned(path: Path) -> bool:
    locked = path / OWNER if path.is_dir() else path
    machine, process, _ = ("", "", "", *path.name.split("."))[-3:]
    is_ours = machine == host() and locked.is_file()
    # A process that lives may own it on a file system whose locks do nothing.
    if not is_ours or _lives_beside(process):
        newest = locked if locked.is_file() else path
        return time.time() - newest.stat().st_mtime > OLD_SECONDS
    handle = os.open(locked, os.O_RDWR)
    try:
        return _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file until it is closed; False if another process has locked it."""
    try:
        effects.lock(handle)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: `_is_touched` decides
        return True
    return True


def _is_touched(path: Path, log: Callable[[str], None]) -> bool:
    """Whether an owner whose lock this process may not see touches its file: on another machine, or where locks do nothing."""
    record = _record(path)
    if record is None or (record["host"] == host() and not _lives_beside(record["pid"])):
        return False
    log(f"{_who(path)} Looking for {SILENT_SECONDS:.0f} s whether it is alive.")
    before, end = path.stat().st_mtime_ns, time.monotonic() + SILENT_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, SILENT_SECONDS / 10))
        if not path.is_file():
            return False
        with open(path, "rb") as file:  # opening makes NFS ask the server
            if os.fstat(file.fileno()).st_mtime_ns != before:
                return True
    return False


def _lives_beside(process: object) -> bool:
    """Whether a process of this machine other than this one has this id."""
    number = int(str(process)) if str(process).isdigit() else 0
    if number in (0, os.getpid()):
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's process; no number of a process
        return number < 1 << 31
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether `path` is the open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _write_record(handle: int) -> None:
    record = {"host": host(), "pid": os.getpid(), "since": datetime.now(UTC).isoformat(" ", "seconds")}
    effects.truncate(handle, 0)
    effects.write(handle, json.dumps(record).encode())


def _record(path: Path) -> dict[str, Any] | None:
    """Who wrote the owner's file; None if it is empty, as for a moment after its creation."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"host", "pid", "since"} <= found.keys() else None


def _who(path: Path) -> str:
    record = _record(path)
    owner = "Another process"
    if record is not None:
        owner = f"Process {record['pid']} on {record['host']} (since {record['since']})"
    return f"{owner} is writing {path.parent}. Type the same command again when it has ended."
