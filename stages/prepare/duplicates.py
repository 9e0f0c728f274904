"""Rows that repeat an earlier row: the same prompt and completions, or nearly the same.

The first of them is kept. Exact duplicates have equal content, and so the same example id. Near duplicates share a
large part of their five-word sequences (Jaccard similarity), estimated by MinHash and found by locality-sensitive
hashing (datasketch). Both kinds need to remember every row kept: exact duplicates in a temporary file, near ones in memory, about
2 KB a row.
"""

import sqlite3
from typing import Any

from cache.errors import MachineError
from stages.prepare.filters import words_of
from stages.settings.data import FilterSettings

WORDS_OF_A_SEQUENCE = 5
NUM_PERMUTATIONS = 128


class Duplicates:
    """Remembers the rows that were kept, and finds the ones that repeat them."""

    def __init__(self, settings: FilterSettings) -> None:
        """Raises `MachineError` when near duplicates are to be dropped and datasketch is not installed."""
        self._kind = settings.duplicates
        if self._kind == "exact":
            # Without a name: SQLite makes a file in the temporary folder and removes it with the connection.
            self._seen = sqlite3.connect("", isolation_level=None)
            self._seen.execute("PRAGMA journal_mode=OFF")
            self._seen.execute("CREATE TABLE seen (id BLOB PRIMARY KEY) WITHOUT ROWID")
        if self._kind == "near":
            try:
                from datasketch import MinHash, MinHashLSH
            except ImportError as error:
                raise MachineError(
                    "filter.duplicates=near needs the package datasketch: pip install -e '.[dedup]'. Or use --set filter.duplicates=exact."
                ) from error
            self._min_hash = MinHash
            self._near = MinHashLSH(threshold=settings.near_duplicate_similarity, num_perm=NUM_PERMUTATIONS)
            self._similarity = settings.near_duplicate_similarity
            self._hashes: dict[Any, Any] = {}

    def reason(self, example_id: str, text: str) -> str | None:
        """Why the next row is dropped; None when it is kept, and remembered."""
        if self._kind == "keep":
            return None
        return self._exact(example_id) if self._kind == "exact" else self._nearly(example_id, text)

    def _exact(self, example_id: str) -> str | None:
        is_new = self._seen.execute(
            "INSERT OR IGNORE INTO seen VALUES (?)", (bytes.fromhex(example_id),)
        ).rowcount
        return None if is_new else "duplicate"

    def _nearly(self, example_id: str, text: str) -> str | None:
        if example_id in self._hashes:
            return "duplicate"
        words = words_of(text)
        hashed = self._min_hash(num_perm=NUM_PERMUTATIONS, seed=1)
        last = max(1, len(words) - WORDS_OF_A_SEQUENCE + 1)
        hashed.update_batch(
            [" ".join(words[start : start + WORDS_OF_A_SEQUENCE]).encode() for start in range(last)]
        )
        found = self._near.query(hashed)
        if any(hashed.jaccard(self._hashes[key]) >= self._similarity for key in found):
            return "near_duplicate"
        self._near.insert(example_id, hashed)
        self._hashes[example_id] = hashed
        return None
