"""Identity as data: canonical JSON to sha256, row keys, and the content of a model's weights.

What changes the numbers goes into the fingerprinted record; nothing else does.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.errors import DataError

ROW_KEY_BYTES = 16
SHORT = 12
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: Any) -> bytes:
    """Sorted-key, whitespace-free UTF-8 JSON; NaN and infinities are refused (ValueError)."""
    return _CANONICAL.encode(value).encode()


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Hex sha256 of the canonical JSON of `identity`."""
    return hashlib.sha256(canonical_json(identity)).hexdigest()


def short(full: str) -> str:
    """The first 12 hex digits, as used in folder names and messages."""
    return full[:SHORT]


def row_key(prompt_ids: np.ndarray, completion_ids: np.ndarray) -> bytes:
    """128-bit key of one (prompt, completion): a hash of the prompt's length and both id sequences.

    The ids are hashed as little-endian int32, so the key is the same on every machine. The
    completion mask is not part of it: reference log-probs are kept for every token, masked or not.
    """
    digest = hashlib.blake2b(digest_size=ROW_KEY_BYTES)
    digest.update(struct.pack("<q", len(prompt_ids)))
    digest.update(np.ascontiguousarray(prompt_ids, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(completion_ids, dtype="<i4").tobytes())
    return digest.digest()


def differing_fields(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines `field: stored -> wanted` for every leaf in which two identities differ."""
    lines = []
    for name in sorted({*stored, *wanted}):
        old, new = stored.get(name), wanted.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differing_fields(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: {_brief(old)} -> {_brief(new)}")
    return lines


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:SHORT] + "..."


@dataclass(frozen=True)
class _Entry:
    """Where the bytes of one tensor lie, and what they are."""

    path: Path
    name: str
    dtype: str
    shape: list[int]
    begin: int
    end: int


def weights_fingerprint(folder: Path) -> str:
    """Hex sha256 over every tensor of a model folder: name, dtype, shape and bytes, in name order.

    The content counts, not the file layout: re-sharded safetensors give the same value. Raises
    `DataError` when the folder holds no safetensors file.
    """
    entries = [entry for path in sorted(folder.glob("*.safetensors")) for entry in _safetensors_entries(path)]
    tensors = {entry.name: entry for entry in entries}
    if not tensors:
        raise DataError(
            f"{folder} holds no .safetensors weights, so they cannot be identified. Convert the model with "
            f"`model.save_pretrained(folder)` of a current transformers."
        )
    digest = hashlib.sha256()
    for name in sorted(tensors):
        entry = tensors[name]
        digest.update(canonical_json([name, entry.dtype, entry.shape]))
        with open(entry.path, "rb") as handle:
            handle.seek(entry.begin)
            size = entry.end - entry.begin
            while size > 0:
                block = handle.read(min(size, 1 << 24))
                if not block:
                    raise DataError(
                        f"{entry.path} ends before tensor {name!r} does; download or save the model again."
                    )
                digest.update(block)
                size -= len(block)
    return digest.hexdigest()


def _safetensors_entries(path: Path) -> list[_Entry]:
    """Every tensor of a file; its offsets count from the file's beginning."""
    size = path.stat().st_size
    with open(path, "rb") as handle:
        try:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > size:
                raise ValueError("its header is cut off")
            header = json.loads(handle.read(length))
            return [
                _Entry(
                    path,
                    name,
                    entry["dtype"],
                    list(entry["shape"]),
                    *(8 + length + int(at) for at in entry["data_offsets"]),
                )
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (struct.error, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{path} is not a safetensors file ({error}); download or save the model again."
            ) from error
