"""Row keys in arrays, and an index that finds them: no Python object for each row.

A key is 16 bytes (`fingerprint.row_key`), here a row of an array of shape (num_keys, 2): its bytes as two uint64.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import pyarrow as pa

from cache.fingerprint import ROW_KEY_BYTES

HALF = np.dtype(np.uint64)


class RowKeys(Sequence[bytes]):
    """Keys in an array; a single one is bytes."""

    def __init__(self, halves: np.ndarray) -> None:
        """`halves` has shape (num_keys, 2) and dtype uint64."""
        self.halves = halves

    @classmethod
    def of(cls, keys: "Iterable[bytes] | RowKeys") -> "RowKeys":
        """Keys given one by one."""
        return keys if isinstance(keys, RowKeys) else cls(np.frombuffer(b"".join(keys), HALF).reshape(-1, 2))

    @classmethod
    def of_column(cls, column: pa.ChunkedArray) -> "RowKeys":
        """An Arrow column of 16 bytes each; one chunk is not copied."""
        chunks = [
            np.frombuffer(chunk.buffers()[1], HALF, 2 * len(chunk), ROW_KEY_BYTES * chunk.offset)
            for chunk in column.chunks
            if len(chunk)
        ]
        return cls(
            (np.concatenate(chunks) if len(chunks) != 1 else chunks[0]).reshape(-1, 2) if chunks else NONE
        )

    @classmethod
    def joined(cls, parts: "Iterable[RowKeys]") -> "RowKeys":
        """The keys of all parts, in order."""
        return cls(np.concatenate([NONE, *(part.halves for part in parts)]))

    def __len__(self) -> int:
        """Number of keys."""
        return len(self.halves)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> "RowKeys": ...
    def __getitem__(self, index: int | slice) -> "bytes | RowKeys":
        """One key as bytes; of a slice, keys in an array."""
        return RowKeys(self.halves[index]) if isinstance(index, slice) else self.halves[index].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        """One key after another, as bytes."""
        return (half.tobytes() for half in self.halves)

    def only(self, chosen: np.ndarray) -> "RowKeys":
        """The keys at these numbers, or where this mask is true."""
        return RowKeys(self.halves[chosen])

    def is_first(self) -> np.ndarray:
        """For each key whether no earlier one is equal; bool, shape (num_keys,)."""
        order = _order(self.halves)
        ordered = self.halves[order]
        first = np.ones(len(self), bool)
        first[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
        return first


NONE = np.zeros((0, 2), HALF)


class KeyIndex:
    """Finds keys by binary search over a sorted copy."""

    def __init__(self, keys: RowKeys) -> None:
        """Sort the keys: 24 bytes and about a microsecond for each."""
        order = _order(keys.halves)
        ordered = keys.halves[order]
        self._places = order.astype(np.uint32 if len(order) < 1 << 32 else np.int64)
        self._first, self._second = (np.ascontiguousarray(ordered[:, half]) for half in (0, 1))
        repeated = (ordered[1:] == ordered[:-1]).all(axis=1).sum() if len(ordered) else 0
        self.num_distinct = len(ordered) - int(repeated)

    def find(self, keys: RowKeys) -> np.ndarray:
        """The place of each key among those that were given, of equal ones the last; -1 where there is none. int64."""
        first, second = keys.halves[:, 0], keys.halves[:, 1]
        at = np.searchsorted(self._first, first, side="right") - 1
        found = np.full(len(at), -1, np.int64)
        left = np.flatnonzero(at >= 0)
        while len(left):  # once, but for keys with one first half
            left = left[self._first[at[left]] == first[left]]
            is_it = self._second[at[left]] == second[left]
            found[left[is_it]] = self._places[at[left[is_it]]]
            left = left[~is_it]
            at[left] -= 1
            left = left[at[left] >= 0]
        return found


def _order(halves: np.ndarray) -> np.ndarray:
    """The stable order of keys, as numbers."""
    return np.lexsort((halves[:, 1], halves[:, 0]))
