"""Row keys in arrays, and an index that finds them: no Python object for each row.

A key is 16 bytes (`fingerprint.row_key`), here a row of an array of shape (num_keys, 2): its bytes as two uint64.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, overload

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
        ordered = _sorted(self.halves)
        found = np.ones(len(self), bool)
        found[ordered.order[1:]] = ~ordered.repeats
        return found


NONE = np.zeros((0, 2), HALF)


class KeyIndex:
    """Finds keys by binary search over a sorted copy."""

    def __init__(self, keys: RowKeys) -> None:
        """Sort the keys: 20 bytes and about half a microsecond for each."""
        ordered = _sorted(keys.halves)
        self._places = ordered.order.astype(np.uint32 if len(keys) < 1 << 32 else np.int64)
        self._first, self._second = ordered.first, ordered.second
        self.num_distinct = len(keys) - int(ordered.repeats.sum())

    def find(self, keys: RowKeys) -> np.ndarray:
        """The place of each key among those that were given, of equal ones the last; -1 where there is none. int64."""
        first, second = keys.halves[:, 0], keys.halves[:, 1]
        # In their order, neighbours are looked for in the same part of the index, which is in the processor's cache then.
        order = np.argsort(first)
        at = np.empty(len(first), np.int64)
        at[order] = np.searchsorted(self._first, first[order], side="right") - 1
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


class _Sorted(NamedTuple):
    """Keys in their stable order: the order as numbers, their halves, and for all but the first whether it repeats the one before."""

    order: np.ndarray
    first: np.ndarray
    second: np.ndarray

    @property
    def repeats(self) -> np.ndarray:
        return (self.first[1:] == self.first[:-1]) & (self.second[1:] == self.second[:-1])


def _sorted(halves: np.ndarray) -> _Sorted:
    first, second = halves[:, 0], halves[:, 1]
    order = np.argsort(first, kind="stable")
    found = _Sorted(order, first[order], second[order])
    clash = (found.first[1:] == found.first[:-1]) & (found.second[1:] != found.second[:-1])
    if clash.any():  # two keys with one first half: none among a billion hashes, but for chosen ones
        order = np.lexsort((second, first))
        found = _Sorted(order, first[order], second[order])
    return found
