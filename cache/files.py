"""How files are written and hashed: whole or not at all.

A file appears under its final name only after its bytes are on disk: temporary name in the same
folder, flush, fsync, rename, fsync of the folder. No content relies on a lock, because `flock` does nothing on many
shared file systems: two writers of the same content leave the same bytes. Locks tell what is being written from what a
killed process left (`ownership.py`).
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cache import effects
from cache.errors import CorruptError, MachineError
from cache.fingerprint import canonical_json
from cache.ownership import lock_temporary, temporary_suffix

TEMPORARY_PREFIX = ".tmp-"


@contextlib.contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """Turn an OSError while writing `path` into a `MachineError` that names the file and the reason."""
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"Cannot write {path}: {error.strerror or error}. Free or enable the disk, or choose another "
            f"folder with --store DIR; what was finished before is kept, so type the same command again."
        ) from error


@contextlib.contextmanager
def temporary_file(folder: Path, name: str) -> Iterator[Path]:
    """Yield an empty temporary file in `folder`, locked by this process; if it is left there afterwards, it is removed."""
    with disk_errors_named(folder):
        effects.make_folders(folder)
    temporary = folder / f"{TEMPORARY_PREFIX}{name}.{temporary_suffix()}"
    with disk_errors_named(folder / name):
        handle = lock_temporary(temporary)
        try:
            yield temporary
        finally:
            try:
                effects.remove(temporary)
            finally:
                os.close(handle)


def commit(temporary: Path, final: Path) -> None:
    """Make `temporary` durable and rename it to `final` in the same folder."""
    effects.sync_file(temporary)
    effects.rename(temporary, final)
    effects.sync_folder(final.parent)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is committed to `path`."""
    with temporary_file(path.parent, path.name) as temporary:
        yield temporary
        commit(temporary, path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with atomic_path(path) as temporary, effects.open_for_writing(temporary) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as sorted, indented JSON to `path`, whole or not at all."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def read_json(path: Path, repair: str | None = None) -> Any:
    """Read JSON from `path`; raises `CorruptError` when it is not JSON, with `repair`, a sentence that says what to type."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        repair = repair or f"Delete {path.parent} and run the stage again."
        raise CorruptError(f"{path} is not readable JSON ({error}). {repair}") from error


def with_digest(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    """`value` with its own sha256 under `key`, for `read_with_digest`."""
    return {**value, key: hashlib.sha256(canonical_json(value)).hexdigest()}


def read_with_digest(path: Path, key: str, repair: str) -> dict[str, Any]:
    """The object that was written `with_digest`; raises `CorruptError`, with `repair`, if anything in it has changed."""
    value = read_json(path, repair)
    try:
        if with_digest({name: part for name, part in value.items() if name != key}, key) == value:
            return value
    except (ValueError, AttributeError):  # no object, or numbers and characters that are never written
        pass
    raise CorruptError(f"{path} was changed after it was written. {repair}")


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes (about 2 GiB/s on one core)."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def publish_folder(staging: Path, final: Path) -> None:
    """Rename a finished `staging` folder to `final`; if another writer made `final` first, that one is kept.

    Its files get the permissions that the umask gives to new files, as `staging` has them.
    """
    with disk_errors_named(final):
        mode = staging.stat().st_mode & 0o666
        for path in sorted(staging.rglob("*")):
            if path.is_file():
                effects.set_mode(path, mode)  # safetensors writes files that only their owner can read
                effects.sync_file(path)
            elif path.is_dir():
                effects.sync_folder(path)
        effects.sync_folder(staging)
        try:
            effects.rename(staging, final)
        except OSError:
            if not final.is_dir():
                raise
            effects.remove_tree(staging)
        effects.sync_folder(final.parent)
