"""Identity as data: canonical JSON to sha256, and row keys.

Everything that changes the numbers is in the record that is hashed, and nothing else is.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

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
    """A line `field: stored -> wanted` for every leaf in which two identities differ."""
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
