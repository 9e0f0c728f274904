"""One portable file of several: a tar without compression whose first member lists name, size and sha256 of the others.

    align-archive.json        archive_version, files, archive_sha256 (of the rest of this list)
    KIND/NAME/FILE ...        in the order of the list

The same files give the same bytes, whoever packs them and when: no times, owners or permissions are kept.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from cache import effects
from cache.errors import CorruptError, StaleError
from cache.files import sha256_file, with_digest
from cache.locations import BLOCK, copy
from cache.names import check_name

LIST = "align-archive.json"
DIGEST = "archive_sha256"
ARCHIVE_VERSION = 1
# Longer lists are no list of this program: a name takes about 200 bytes of it.
LIST_LIMIT = 1 << 28


def write_archive(file: IO[bytes], files: Mapping[str, Path], sha256: Mapping[str, str]) -> int:
    """Write the files by name into `file`; returns the bytes of their contents.

    Raises `StaleError` or `CorruptError` for one that is missing, changes meanwhile, or has another content than `sha256` says.
    """
    listed = [_record(name, path, sha256.get(name)) for name, path in sorted(files.items())]
    header = with_digest({"archive_version": ARCHIVE_VERSION, "files": listed}, DIGEST)
    text = json.dumps(header, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT, bufsize=BLOCK) as tar:
        tar.addfile(_member(LIST, len(text)), io.BytesIO(text))
        for record in listed:
            with open(files[record["name"]], "rb") as source:
                hashed = _Hashed(source)
                tar.addfile(_member(record["name"], record["num_bytes"]), hashed)  # type: ignore[arg-type]
            if hashed.digest.hexdigest() != record["sha256"]:
                raise CorruptError(
                    f"{files[record['name']]} was changed while it was packed. Type the same command again."
                )
    return sum(record["num_bytes"] for record in listed)


def unpack_archive(file: IO[bytes], folder: Path, where: str) -> list[str]:
    """Write the files of an archive into `folder`, which is empty; returns their names.

    Nothing in it is believed: raises `CorruptError` for a name outside of the folder, for what is no plain file, not listed, missing or
    other than the list says, and `StaleError` for a version that is not read. `where` names the archive in messages.
    """
    try:
        with tarfile.open(fileobj=file, mode="r|", bufsize=BLOCK) as tar:
            listed = _read_list(tar, where)
            for record in listed:
                _unpack_member(tar, record, folder, where)
            if tar.next() is not None:
                raise CorruptError(f"{where} holds more than its list. {_AGAIN}")
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise CorruptError(
            f"{where} is no archive of `align export`, or it was cut ({error}). {_AGAIN}"
        ) from error
    return [record["name"] for record in listed]


_AGAIN = "Export or copy it again."


def _record(name: str, path: Path, expected: str | None) -> dict[str, Any]:
    if not path.is_file():
        raise StaleError(f"{path} is missing. Run the stage that makes it again.")
    found = sha256_file(path)
    if expected not in (None, found):
        raise CorruptError(
            f"{path} is damaged: its sha256 is not the one that was written. Run the stage that makes it again."
        )
    return {"name": name, "num_bytes": path.stat().st_size, "sha256": found}


def _read_list(tar: tarfile.TarFile, where: str) -> list[dict[str, Any]]:
    member = tar.next()
    if member is None or member.name != LIST or not member.isreg() or member.size > LIST_LIMIT:
        raise CorruptError(f"{where} is no archive of `align export`: it does not begin with {LIST}.")
    content = tar.extractfile(member)
    assert content is not None
    header = json.loads(content.read())
    rest = {key: value for key, value in header.items() if key != DIGEST} if isinstance(header, dict) else {}
    if with_digest(rest, DIGEST) != header:
        raise CorruptError(f"{LIST} in {where} was changed after it was written. {_AGAIN}")
    if header["archive_version"] != ARCHIVE_VERSION:
        raise StaleError(
            f"{where} has archive version {header['archive_version']}; this align reads {ARCHIVE_VERSION}. Export it again with "
            f"this version, or import it with the one that wrote it."
        )
    return header["files"]


def _unpack_member(tar: tarfile.TarFile, record: Mapping[str, Any], folder: Path, where: str) -> None:
    name = record["name"]
    check_name(name, where)
    member = tar.next()
    if member is None or member.name != name or not member.isreg() or member.size != record["num_bytes"]:
        found = "it ends" if member is None else f"{member.name!r} of {member.size:,} bytes stands"
        raise CorruptError(f"{where}: {found} in the place of {name}. {_AGAIN}")
    source = tar.extractfile(member)
    assert source is not None
    effects.make_folders((folder / name).parent)
    digest = copy(source, folder / name)
    if digest != record["sha256"]:
        raise CorruptError(f"{where}: {name} is damaged, its sha256 is not the one in the list. {_AGAIN}")


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    return member


class _Hashed:
    """A file whose bytes are hashed as they are read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        self.digest.update(content)
        return content
