"""The store of reference log-probs: addressed by row, filled once, shared by every loss.

    <store>/ref-logps/<name>-<short fingerprint of the reference>/
        manifest.json             identity of the reference (weights, architecture, dtype, scorer)
        <sha256>.arrow            row_key, token_logps (float32, nats, one per completion token)

A shard's name is the sha256 of its bytes, so each shard can be checked on its own: a flipped bit, a cut file or a
shard of another reference is an error, the rows of a lost shard are scored again, and any number of workers add shards
without a lock. Rows are looked up by their 128-bit key, whatever dataset, split, order or loss they are needed for.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cache.artifacts import MANIFEST, machine_provenance
from cache.checked import note_checked, unchanged_files
from cache.errors import CorruptError, StaleError
from cache.files import read_json, write_json
from cache.fingerprint import ROW_KEY_BYTES, differing_fields, fingerprint, short
from cache.row_keys import KeyIndex, RowKeys
from cache.shards import SHARD_SUFFIX, map_shard, read_shard, write_content_named_shard

SCHEMA = pa.schema([("row_key", pa.binary(ROW_KEY_BYTES)), ("token_logps", pa.list_(pa.float32()))])
# Rounding in log-sum-exp can put a log-prob just above zero; a value above this is not a log-prob.
POSITIVE_TOLERANCE = 1e-4
# Rows that are added before the index is sorted again: as many, and this share of all, so that sorting stays a small part.
PENDING_ROWS = 1 << 16
PENDING_SHARE = 16
REPAIR = "Delete that file and run `align cache-ref` again: only its rows are scored again."


class RefLogps:
    """Reference log-probs of one reference, opened for reading and adding.

    Values are memory-mapped. Rows that were added here are in a dict until there are enough of them to sort the index again.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], believe_notes: bool = True) -> None:
        """Open the store at `folder`, checking its identity and every shard's bytes and values.

        With `believe_notes`, shards that have the size and times of their last check (`checked.py`) are not read again.
        """
        self.folder = folder
        self.identity = identity
        self.fingerprint = fingerprint(identity)
        self._check_identity()
        self._shards: list[_Shard] = []
        self._pending: dict[bytes, tuple[int, int]] = {}
        paths = {path.name: path for path in sorted(folder.glob(f"*{SHARD_SUFFIX}"))}
        sha256 = {name: name.removesuffix(SHARD_SUFFIX) for name in paths}
        unchanged = unchanged_files(folder, sha256) if believe_notes else set()
        for name, path in paths.items():
            self._shards.append(self._open_shard(path, name not in unchanged))
        if believe_notes and sha256.keys() - unchanged:
            note_checked(folder, sha256)
        self._build_index()

    def __len__(self) -> int:
        """Number of rows with a value."""
        return self._index.num_distinct + len(self._pending)

    def __contains__(self, key: bytes) -> bool:
        """Whether the row of this key has been scored."""
        return key in self._pending or bool(self._index.find(RowKeys.of([key]))[0] >= 0)

    def keys(self) -> RowKeys:
        """The keys of all rows with a value; a key that is in two shards twice."""
        return RowKeys.joined(shard.keys for shard in self._shards)

    def get(self, key: bytes) -> np.ndarray:
        """Log-probs of one row's completion tokens, float32, nats, shape (num_tokens,)."""
        if key in self._pending:
            shard, row = self._pending[key]
            return self._shards[shard].row(row)
        place = int(self._index.find(RowKeys.of([key]))[0])
        if place < 0:
            raise KeyError(key.hex())
        shard = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._shards[shard].row(place - int(self._starts[shard]))

    def _build_index(self) -> None:
        self._index = KeyIndex(self.keys())
        lengths = [len(shard.keys) for shard in self._shards]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[:-1]
        self._pending.clear()

    def add(self, keys: Sequence[bytes], token_logps: Sequence[np.ndarray]) -> Path:
        """Append one shard, durable when this returns; raises `CorruptError` for a value that is not a log-prob."""
        self.write_manifest()
        lengths = np.array([len(values) for values in token_logps], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        flat = np.concatenate(token_logps).astype(np.float32) if len(token_logps) else np.zeros(0, np.float32)
        check_values(
            keys, offsets, flat, "the scorer's output", "The reference model gives no usable log-probs here."
        )
        columns = [
            pa.array(keys, type=SCHEMA.field("row_key").type),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.minimum(flat, 0.0))),
        ]
        table = pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata({"reference": self.fingerprint}))
        path = write_content_named_shard(self.folder, table)
        shard = self._open_shard(path, True)
        self._shards.append(shard)
        new = np.flatnonzero(self.is_missing(keys)).tolist()
        self._pending.update({keys[row]: (len(self._shards) - 1, row) for row in new})
        if len(self._pending) > max(PENDING_ROWS, len(self) // PENDING_SHARE):
            self._build_index()
        return path

    def write_manifest(self) -> None:
        """Write the manifest unless it is there."""
        if not (self.folder / MANIFEST).is_file():
            named = {"fingerprint": self.fingerprint, "identity": self.identity}
            write_json(self.folder / MANIFEST, {**named, "provenance": machine_provenance()})

    def is_missing(self, keys: Iterable[bytes]) -> np.ndarray:
        """For each key whether it has no value, bool."""
        asked = RowKeys.of(keys)
        absent = self._index.find(asked) < 0
        if self._pending:
            for number in np.flatnonzero(absent):
                absent[number] = asked[int(number)] not in self._pending
        return absent

    def missing(self, keys: Iterable[bytes]) -> RowKeys:
        """The distinct keys without a value, in the order given."""
        asked = RowKeys.of(keys)
        absent = asked.only(self.is_missing(asked))
        return absent.only(absent.is_first())

    def require(self, keys: Iterable[bytes], command: str) -> None:
        """Raise `StaleError` naming how many of `keys` are missing and the command that scores them."""
        asked = RowKeys.of(keys)
        missing = self.missing(asked)
        if len(missing):
            raise StaleError(
                f"Reference log-probs are missing for {len(missing)} of {int(asked.is_first().sum())} rows in {self.folder} "
                f"(first: {missing[0].hex()}). Score them with: {command}"
            )

    def _check_identity(self) -> None:
        path = self.folder / MANIFEST
        if not path.is_file():
            return
        repair = f"Delete {path} and run `align cache-ref` again: no row is scored again."
        manifest = read_json(path, repair)
        stored = manifest.get("identity") if isinstance(manifest, dict) else None
        if not isinstance(stored, dict) or manifest.get("fingerprint") != _fingerprint(stored):
            raise CorruptError(f"{path} was changed after it was written. {repair}")
        if manifest["fingerprint"] != self.fingerprint:
            fields = "; ".join(differing_fields(stored, self.identity))
            raise StaleError(
                f"{self.folder} belongs to another reference: {fields}. A folder of log-probs ends in the fingerprint of its "
                f"reference: rename this one to end in -{short(manifest['fingerprint'])}, or delete it."
            )

    def _open_shard(self, path: Path, checks: bool) -> "_Shard":
        """Map a shard; with `checks` its bytes and values are read and compared with what they must be."""
        sha256 = path.name.removesuffix(SHARD_SUFFIX)
        table = read_shard(path, sha256, REPAIR) if checks else map_shard(path, REPAIR)
        metadata = table.schema.metadata or {}
        if metadata.get(b"reference", b"").decode() != self.fingerprint or not table.schema.equals(SCHEMA):
            raise CorruptError(f"{path} was written for another reference or in another format. {REPAIR}")
        column = table.column("token_logps")
        # One chunk, as this module writes, stays in the file; `combine_chunks` would copy it into memory.
        lists = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        keys = RowKeys.of_column(table.column("row_key"))
        shard = _Shard(keys, lists.offsets.to_numpy(), lists.values.to_numpy())
        if checks:
            check_values(keys, shard.offsets, shard.values, str(path), REPAIR)
        return shard


class _Shard(NamedTuple):
    """The columns of a shard."""

    keys: RowKeys
    offsets: np.ndarray
    values: np.ndarray

    def row(self, number: int) -> np.ndarray:
        begin, end = self.offsets[number : number + 2]
        return self.values[begin:end]


def _fingerprint(identity: Mapping[str, Any]) -> str | None:
    """The fingerprint of an identity that was read; None if it holds what no identity can."""
    try:
        return fingerprint(identity)
    except ValueError:
        return None


def check_values(
    keys: Sequence[bytes], offsets: np.ndarray, values: np.ndarray, where: str, repair: str
) -> None:
    """Raise `CorruptError` naming the row and token of the first value that is not a log-prob."""
    bad = ~(np.isfinite(values) & (values <= POSITIVE_TOLERANCE))
    if bad.any():
        position = int(np.argmax(bad))
        row = int(np.searchsorted(offsets, position, side="right")) - 1
        raise CorruptError(
            f"{values[position]} is not a log-prob: row {keys[row].hex()}, completion token "
            f"{position - int(offsets[row])}, in {where}. {repair}"
        )
