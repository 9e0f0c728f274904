"""Rows that share a prompt, anywhere in the source, as one row. They are collected on disk, not in memory."""

import pickle
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from hashlib import blake2b
from itertools import groupby
from operator import itemgetter

from cache.fingerprint import canonical_json
from stages.data.source_row import SourceRow


def gather(rows: Iterable[SourceRow], columns: Sequence[str]) -> Iterator[SourceRow]:
    """The rows with the same values in `columns` as one row `{"rows": [...]}`, in the order of first appearance.

    A column that is absent is as one that is empty. A row that could not be read stays a row of its own, and so does
    one without the first of the columns. The location is that of the first row with the number of the others.
    """
    # Without a name: SQLite makes a file in the temporary folder and removes it with the connection.
    with closing(sqlite3.connect("", isolation_level=None)) as store:
        store.execute("PRAGMA journal_mode=OFF")
        store.execute("CREATE TABLE firsts (key BLOB PRIMARY KEY, first INTEGER) WITHOUT ROWID")
        store.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, first INTEGER, row BLOB)")
        for number, row in enumerate(rows):
            key = _key(row, columns)
            first = number
            if key is not None:
                store.execute("INSERT OR IGNORE INTO firsts VALUES (?, ?)", (key, number))
                [first] = store.execute("SELECT first FROM firsts WHERE key = ?", (key,)).fetchone()
            store.execute("INSERT INTO rows VALUES (?, ?, ?)", (number, first, pickle.dumps(row)))
        store.execute("CREATE INDEX by_first ON rows (first, number)")
        found = store.execute("SELECT first, row FROM rows INDEXED BY by_first ORDER BY first, number")
        for _, members in groupby(found, key=itemgetter(0)):
            yield _together([pickle.loads(row) for _, row in members])


def _key(row: SourceRow, columns: Sequence[str]) -> bytes | None:
    if not row.value or columns[0] not in row.value:
        return None
    values = [row.value[columns[0]], *(row.value.get(column) or None for column in columns[1:])]
    try:
        return blake2b(canonical_json(values), digest_size=20).digest()
    except (TypeError, ValueError):
        return None


def _together(members: list[SourceRow]) -> SourceRow:
    first = members[0]
    if first.value is None:
        return first
    location = first.location if len(members) == 1 else f"{first.location} and {len(members) - 1} more"
    return replace(first, location=location, value={"rows": [member.value for member in members]})
