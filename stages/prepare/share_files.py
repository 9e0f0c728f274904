"""The files of a share: what one job made of its batches of source rows, to be read again when all shares are joined.

    examples-00000.arrow ...  the examples of the batches i, i + N, i + 2 N, ..., in order
    rejected.jsonl            the rows of these batches that could not be used
    manifest.json             among the counts, those of all its batches

A share has no mismatched rows and no duplicates left out: they depend on the rows of the other shares.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from cache.artifacts import Artifact, Draft
from stages.data.rows import Example, Row, to_table
from stages.prepare.counts import MadeExample, RowCounts
from stages.prepare.examples import Outcome, RejectedRow
from stages.prepare.rejected import NAME as REJECTED
from stages.prepare.shard_writer import SHARD_EXAMPLES
from stages.runtime.shares import Worker

# The columns beside those of rows. Weights keep their 64 bits, because the join counts them.
ADDED = pa.schema(
    [
        ("exact_weight", pa.float64()),
        ("begins_example", pa.bool_()),
        ("split", pa.string()),
        ("source_name", pa.string()),
        ("num_merged", pa.int32()),
        ("loses_characters", pa.bool_()),
        ("text", pa.string()),
    ]
)
LISTS = ("prompt_ids", "completion_ids", "completion_mask")


def write_share(draft: Draft, outcomes: Iterable[Outcome], worker: Worker) -> RowCounts:
    """Write the outcomes of the worker's batches; returns what was counted before any example is kept."""
    counts, writer = RowCounts(), _ShareWriter(draft)
    for place, outcome in enumerate(outcomes):
        number = worker.index + place * worker.count
        counts.add(outcome.counts)
        writer.add(number, outcome)
    writer.finish()
    return counts


class _ShareWriter:
    """Collects examples with the numbers of their batches, and writes them in shards."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.made: list[MadeExample] = []
        self.batches: list[int] = []
        self.num_shards = 0

    def add(self, batch: int, outcome: Outcome) -> None:
        self.made += outcome.examples
        self.batches += [batch] * len(outcome.examples)
        if outcome.rejected:
            with open(self.draft.path / REJECTED, "a", encoding="ascii") as handle:
                handle.writelines(_rejected_line(batch, row) for row in outcome.rejected)
        if len(self.made) >= SHARD_EXAMPLES:
            self.finish()

    def finish(self) -> None:
        if not self.made:
            return
        table = share_table(self.made, self.batches)
        self.draft.write_shard(f"examples-{self.num_shards:05d}.arrow", table)
        self.num_shards += 1
        self.made, self.batches = [], []


def _rejected_line(batch: int, row: RejectedRow) -> str:
    return json.dumps({"batch": batch, **vars(row)}) + "\n"


def share_table(made: Sequence[MadeExample], batches: Sequence[int]) -> pa.Table:
    """The columns of rows, of which `cycle` has the number of the batch, and those of `ADDED`."""
    table = to_table([one.example for one in made], batches)
    added = [_added(one, row, place == 0) for one in made for place, row in enumerate(one.example.rows)]
    for number, field in enumerate(ADDED):
        table = table.append_column(field, pa.array([values[number] for values in added], field.type))
    return table


def _added(made: MadeExample, row: Row, begins: bool) -> tuple[Any, ...]:
    return row.weight, begins, made.split, made.source, made.num_merged, made.loses_characters, made.text


def joined(shares: Sequence[Artifact]) -> Iterator[Outcome]:
    """The outcomes of all batches in the order of the source, and before them what each share counted."""
    for share in shares:
        yield Outcome(counts_of(share.counts))
    examples = [_Ahead(_examples(share)) for share in shares]
    rejected = [_Ahead(_rejected(share)) for share in shares]
    for batch in range(max(share.counts["batches"] for share in shares)):
        of = batch % len(shares)
        yield Outcome(RowCounts(), examples[of].take(batch), rejected[of].take(batch))


class _Ahead:
    """Takes from an iterator of `(batch, value)` what belongs to one batch after the other."""

    def __init__(self, values: Iterator[tuple[int, Any]]) -> None:
        self.values = values
        self.next = next(values, None)

    def take(self, batch: int) -> list[Any]:
        taken = []
        while self.next is not None and self.next[0] == batch:
            taken.append(self.next[1])
            self.next = next(self.values, None)
        return taken


def _rejected(share: Artifact) -> Iterator[tuple[int, RejectedRow]]:
    with suppress(FileNotFoundError), open(share.path / REJECTED, encoding="ascii") as lines:
        for line in lines:
            row = json.loads(line)
            yield row.pop("batch"), RejectedRow(**row)


def _examples(share: Artifact) -> Iterator[tuple[int, MadeExample]]:
    for table in share.shards("examples-"):
        yield from examples_of(table.combine_chunks())


def examples_of(table: pa.Table) -> Iterator[tuple[int, MadeExample]]:
    """What `share_table` was made of, one example after the other with the number of its batch."""
    prompts, ids, masks = (_slices(table, name) for name in LISTS)
    rows = table.drop_columns([*LISTS, "row_key"]).to_pylist()
    begins = [number for number, row in enumerate(rows) if row["begins_example"]]
    for begin, end in pairwise([*begins, len(rows)]):
        first = rows[begin]
        made = [_row(*parts) for parts in zip(rows[begin:end], ids[begin:end], masks[begin:end], strict=True)]
        example = Example(first["example_id"], first["source"], prompts[begin], made, first["prompt_cut"])
        rest = (first[name] for name in ("num_merged", "loses_characters", "text"))
        yield first["cycle"], MadeExample(first["split"], first["source_name"], example, *rest)


def _row(row: Mapping[str, Any], ids: np.ndarray, mask: np.ndarray) -> Row:
    return Row(row["role"], ids, mask, row["score"], row["exact_weight"], row["completion_cut"])


def _slices(table: pa.Table, name: str) -> list[np.ndarray]:
    """The values of each row of a list column."""
    [column] = table.column(name).chunks
    values = column.values.to_numpy(zero_copy_only=False)
    return [values[begin:end] for begin, end in pairwise(column.offsets.tolist())]


def share_counts(counts: RowCounts, batches: int) -> dict[str, Any]:
    """The counts of a share for its manifest; `batches` is the number of batches of all shares together."""
    return {
        "rows_in": dict(counts.rows_in),
        "dropped": [[source, reason, count] for (source, reason), count in sorted(counts.dropped.items())],
        "notes": dict(counts.notes),
        "chat_rows": counts.chat_rows,
        "batches": batches,
    }


def counts_of(stored: Mapping[str, Any]) -> RowCounts:
    """What `share_counts` was made of."""
    dropped = {(source, reason): count for source, reason, count in stored["dropped"]}
    return RowCounts(
        rows_in=Counter(stored["rows_in"]),
        dropped=Counter(dropped),
        notes=Counter(stored["notes"]),
        chat_rows=stored["chat_rows"],
    )
