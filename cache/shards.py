"""Shards: Arrow IPC files, written whole, and checked against their sha256 before they are read.

The IPC stream format is not used: a stream cut at a batch boundary reads as a shorter table. Arrow has no
checksums of its own, so a flipped bit in two thirds of the positions reads as another number; the sha256 kept outside
the shard detects it.
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from cache import effects
from cache.errors import CorruptError, StaleError
from cache.files import atomic_path, commit, sha256_file, temporary_file

SHARD_SUFFIX = ".arrow"


@dataclass(frozen=True)
class ShardRecord:
    """The entry of a shard in a manifest: file name, size in bytes, sha256, number of rows."""

    name: str
    num_bytes: int
    sha256: str
    num_rows: int


def write_shard(path: Path, table: pa.Table) -> ShardRecord:
    """Write `table` to `path` as one IPC file, whole or not at all, and return its record."""
    with atomic_path(path) as temporary:
        _write_ipc(temporary, table)
        record = ShardRecord(path.name, temporary.stat().st_size, sha256_file(temporary), table.num_rows)
    return record


def write_content_named_shard(folder: Path, table: pa.Table) -> Path:
    """Write `table` into `folder` under its own sha256, so that its content can be checked against its name."""
    with temporary_file(folder, "shard") as temporary:
        _write_ipc(temporary, table)
        final = folder / f"{sha256_file(temporary)}{SHARD_SUFFIX}"
        commit(temporary, final)
    return final


def read_shard(path: Path, sha256: str, repair: str) -> pa.Table:
    """Memory-map a shard whose bytes have been checked against `sha256`.

    Raises `StaleError` when it is missing and `CorruptError` when its bytes are not those that were
    written; both messages end with `repair`, a sentence that says what to type.
    """
    if not path.is_file():
        raise StaleError(f"Shard {path} is missing. {repair}")
    found = sha256_file(path)
    if found != sha256:
        raise CorruptError(
            f"Shard {path} is damaged: its bytes have sha256 {found[:12]}, those that were written {sha256[:12]}. {repair}"
        )
    return map_shard(path, repair, validates=True)


def map_shard(path: Path, repair: str, validates: bool = False) -> pa.Table:
    """Memory-map a shard whose bytes are known to be right; with `validates` also what Arrow's offsets point to."""
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        if validates:
            table.validate(full=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise CorruptError(f"Shard {path} is not a readable Arrow file ({error}). {repair}") from error
    return table


def _write_ipc(path: Path, table: pa.Table) -> None:
    with effects.open_for_writing(path) as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
