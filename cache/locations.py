"""Files on this machine, on object storage and behind HTTP: a path, or a URL of a file system that fsspec knows.

An object is read and written whole. Credentials are those that the library of the file system finds: no URL may hold one.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from cache import effects
from cache.errors import DataError, MachineError, UsageError
from cache.files import atomic_path

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")
BLOCK = 1 << 20
# Libraries of fsspec's file systems, whose errors are not all of Python's own kinds.
LIBRARIES = {
    "fsspec",
    "s3fs",
    "gcsfs",
    "adlfs",
    "botocore",
    "aiobotocore",
    "aiohttp",
    "huggingface_hub",
    "requests",
    "httpx",
    "google",
    "azure",
}


def is_url(where: str) -> bool:
    """Whether this is a URL and not a path."""
    return "://" in where


def file_system(url: str) -> "tuple[AbstractFileSystem, str]":
    """The file system of a URL and the path in it; raises `UsageError` or `MachineError` where there is none."""
    from fsspec.core import url_to_fs

    try:
        with _errors_named(url):
            return url_to_fs(url)
    except ValueError as error:
        raise UsageError(
            f"{url}: {error}. Expected s3://, gs://, hf://, https:// or another file system of fsspec."
        ) from error
    except ImportError as error:
        raise MachineError(
            f"{url} needs a package that is not installed: {error}. For s3://: pip install 'align[s3]'."
        ) from error


@contextmanager
def open_to_read(where: str) -> Iterator[IO[bytes]]:
    """A file or an object, from its beginning; raises `DataError` where there is none."""
    if not is_url(where):
        if not Path(where).is_file():
            raise DataError(f"{where} is not there.")
        with open(where, "rb") as file:
            yield file
        return
    system, path = file_system(where)
    with _errors_named(where), system.open(path, "rb") as file:
        yield file  # type: ignore[invalid-yield]  bytes, by the mode


def write_whole(where: str, write: Callable[[Any], T]) -> T:
    """What `write` writes into the file it is given appears at a path or URL whole, or not at all."""
    if not is_url(where):
        with atomic_path(Path(where)) as temporary, effects.open_for_writing(temporary) as file:
            return write(file)
    system, path = file_system(where)
    with tempfile.NamedTemporaryFile(prefix="align-") as file:
        result = write(file)
        file.flush()
        with _errors_named(where):
            system.put_file(file.name, path)
    return result


class Objects:
    """The objects below a URL, by the rest of their names."""

    def __init__(self, url: str) -> None:
        """Nothing is reached."""
        self.url = url.rstrip("/")
        self._system, self._root = file_system(self.url)

    @property
    def is_writable(self) -> bool:
        """Whether objects can be put here at all."""
        return not self.url.startswith(("http://", "https://"))

    def check_writable(self) -> None:
        """Raise `UsageError` where no object can be put."""
        if not self.is_writable:
            raise UsageError(
                f"{self.url} can only be read. Choose a store that can be written (--store DIR or s3://...), and fill it with "
                f"`align export` and `align import`."
            )

    def names(self, folder: str) -> list[str]:
        """The names in a folder, in order; none where it is not there."""
        self._system.invalidate_cache()
        try:
            with _errors_named(f"{self.url}/{folder}"):
                found = self._system.ls(f"{self._root}/{folder}", detail=False)
        except DataError:
            return []
        return sorted({entry.rstrip("/").rsplit("/", 1)[-1] for entry in found})

    def read(self, name: str) -> bytes | None:
        """A small object; None where it is not there."""
        try:
            with _errors_named(f"{self.url}/{name}"):
                return bytes(self._system.cat_file(f"{self._root}/{name}"))  # type: ignore[bad-argument-type]
        except DataError:
            return None

    def fetch(self, name: str, target: Path) -> bool:
        """Write an object into a new file; False where it is not there."""
        try:
            with open_to_read(f"{self.url}/{name}") as source:
                effects.make_folders(target.parent)
                copy(source, target)
        except DataError:
            return False
        return True

    def put_new(self, name: str, source: Path) -> None:
        """Put a file whole, unless an object of its name and size is there."""
        path = f"{self._root}/{name}"
        self._system.invalidate_cache()
        with _errors_named(f"{self.url}/{name}"):
            is_there = self._system.exists(path) and self._system.size(path) == source.stat().st_size
        if not is_there:
            self.put(name, source)

    def put(self, name: str, source: Path) -> None:
        """Put a file whole, in the place of an object of its name."""
        self.check_writable()
        with _errors_named(f"{self.url}/{name}"):
            self._system.put_file(str(source), f"{self._root}/{name}")


def copy(source: IO[bytes], target: Path) -> str:
    """Write all of `source` into a new file; the sha256 of what was written."""
    digest, handle = hashlib.sha256(), effects.create(target)
    try:
        while block := source.read(BLOCK):
            digest.update(block)
            effects.write(handle, block)
    finally:
        os.close(handle)
    return digest.hexdigest()


@contextmanager
def _errors_named(url: str) -> Iterator[None]:
    """What a file system reports as one line; bugs keep their traceback."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{url} is not there, or cannot be reached.") from error
    except NotImplementedError as error:
        raise UsageError(f"{url} can only be read.") from error
    except (ImportError, ValueError):
        raise
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in LIBRARIES:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MachineError(
            f"Cannot reach {url}: {reason}. Type the same command again when it can be reached."
        ) from error
