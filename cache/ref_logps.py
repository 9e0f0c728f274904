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
from typing import Any

import numpy as np
import pyarrow as pa

from cache.artifacts import MANIFEST, machine_provenance
from cache.errors import CorruptError, StaleError
from cache.files import read_json, write_json
from cache.fingerprint import ROW_KEY_BYTES, differing_fields, fingerprint, short
from cache.shards import SHARD_SUFFIX, read_shard, write_content_named_shard

SCHEMA = pa.schema([("row_key", pa.binary(ROW_KEY_BYTES)), ("token_logps", pa.list_(pa.float32()))])
# Rounding in log-sum-exp can put a log-prob just above zero; a value above this is not a log-prob.
POSITIVE_TOLERANCE = 1e-4
REPAIR = "Delete that file and run `align cache-ref` again: only its rows are scored again."


class RefLogps:
    """Reference log-probs of one reference, opened for reading and adding."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Open the store at `folder`, checking its identity and every shard's bytes and values."""
        self.folder = folder
        self.identity = identity
        self.fingerprint = fingerprint(identity)
        self._check_identity()
        self._values: list[np.ndarray] = []
        self._offsets: list[np.ndarray] = []
        self._where: dict[bytes, tuple[int, int]] = {}
        for path in sorted(folder.glob(f"*{SHARD_SUFFIX}")):
            self._add_shard(path)

    def __len__(self) -> int:
        """Number of rows with a value."""
        return len(self._where)

    def __contains__(self, key: bytes) -> bool:
        """Whether the row of this key has been scored."""
        return key in self._where

    def get(self, key: bytes) -> np.ndarray:
        """Log-probs of one row's completion tokens, float32, nats, shape (num_tokens,)."""
        shard, row = self._where[key]
        begin, end = self._offsets[shard][row : row + 2]
        return self._values[shard][begin:end]

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
        self._add_shard(path)
        return path

    def write_manifest(self) -> None:
        """Write the manifest unless it is there."""
        if not (self.folder / MANIFEST).is_file():
            named = {"fingerprint": self.fingerprint, "identity": self.identity}
            write_json(self.folder / MANIFEST, {**named, "provenance": machine_provenance()})

    def missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """The distinct keys without a value, in the order given."""
        return list(dict.fromkeys(key for key in keys if key not in self._where))

    def require(self, keys: Sequence[bytes], command: str) -> None:
        """Raise `StaleError` naming how many of `keys` are missing and the command that scores them."""
        missing = self.missing(keys)
        if missing:
            raise StaleError(
                f"Reference log-probs are missing for {len(missing)} of {len(set(keys))} rows in {self.folder} "
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

    def _add_shard(self, path: Path) -> None:
        table = read_shard(path, path.name.removesuffix(SHARD_SUFFIX), REPAIR)
        metadata = table.schema.metadata or {}
        if metadata.get(b"reference", b"").decode() != self.fingerprint or not table.schema.equals(SCHEMA):
            raise CorruptError(f"{path} was written for another reference or in another format. {REPAIR}")
        keys = table.column("row_key").combine_chunks().to_pylist()
        lists = table.column("token_logps").combine_chunks()
        offsets = lists.offsets.to_numpy()
        values = lists.values.to_numpy()
        check_values(keys, offsets, values, str(path), REPAIR)
        shard = len(self._values)
        self._values.append(values)
        self._offsets.append(offsets)
        self._where.update({key: (shard, row) for row, key in enumerate(keys)})


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
