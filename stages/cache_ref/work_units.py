"""How the work of cache-ref is cut into units and divided over processes.

A unit is up to 256 examples of a row set in the order of their prompts' tokens, so that examples that begin alike meet.
Units and their owners are a function of the rows and the number of workers alone, so workers need not communicate, and
together they write the bytes that one would.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cache.errors import UsageError
from cache.ref_logps import RefLogps
from stages.data.rows import RowSet
from stages.engine.shared_tokens import UNIT_EXAMPLES, in_units


@dataclass(frozen=True)
class WorkUnit:
    """Rows to score together and to write as one shard.

    Each group holds the row numbers of one example: they share a prompt. int64, shape (rows of the example,).
    """

    rows: RowSet
    groups: list[np.ndarray]

    @property
    def keys(self) -> list[bytes]:
        """Row keys, in the order of the groups."""
        return [self.rows.keys[row] for group in self.groups for row in group]

    def unscored(self, reference: RefLogps) -> "WorkUnit":
        """The unit without the rows that the store holds already."""
        groups = [
            np.array([row for row in group if self.rows.keys[row] not in reference]) for group in self.groups
        ]
        return WorkUnit(self.rows, [group for group in groups if len(group)])


@dataclass(frozen=True)
class Worker:
    """One of `count` processes that divide the work; it scores every `count`-th unit, from number `index` on."""

    index: int = 0
    count: int = 1


def choose_worker(share: str | None) -> Worker:
    """The worker of `--shard i/N` (i from 1), else of torchrun's environment; raises `UsageError` for anything else."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if share is None:
        return Worker(rank, size)
    index, slash, count = share.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise UsageError(f"--shard {share}: expected i/N with i from 1 to N, for example --shard 1/8.")
    if size > 1:
        raise UsageError(
            "--shard is for independent jobs; under torchrun the ranks divide the work by themselves."
        )
    return Worker(int(index) - 1, int(count))


def units_of(row_sets: Sequence[RowSet], worker: Worker) -> Iterator[WorkUnit]:
    """This worker's units. A key belongs to the first unit that holds it, so the units of all workers are disjoint."""
    seen: set[bytes] = set()
    for number, unit in enumerate(_examples_alike(row_sets)):
        keys, firsts = unit.rows.keys, []
        for group in unit.groups:
            unseen = [row for row in group if keys[row] not in seen]
            first_of_key = {keys[row]: row for row in reversed(unseen)}
            seen.update(first_of_key)
            if first_of_key:
                firsts.append(np.array(sorted(first_of_key.values())))
        if firsts and number % worker.count == worker.index:
            yield WorkUnit(unit.rows, firsts)


def _examples_alike(row_sets: Sequence[RowSet]) -> Iterator[WorkUnit]:
    """All rows in units of `UNIT_EXAMPLES` examples in the order of their prompts; none goes across two row sets."""
    for rows in row_sets:
        for examples in in_units([rows.prompt(row) for row in rows.starts], UNIT_EXAMPLES):
            yield WorkUnit(
                rows, [np.arange(rows.starts[example], rows.ends[example]) for example in examples]
            )
