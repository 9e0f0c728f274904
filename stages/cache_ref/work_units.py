"""How the work of cache-ref is cut into units and divided over processes.

A unit is up to 256 examples, in the order of their prompts' tokens within a large window of a row set, so that examples that
begin alike meet.
Units and their owners are a function of the rows and the number of workers alone, so workers need not communicate, and
together they write the bytes that one would.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cache.ref_logps import RefLogps
from cache.row_keys import RowKeys
from stages.data.rows import RowSet
from stages.engine.shared_tokens import UNIT_EXAMPLES, in_units
from stages.runtime.shares import Worker

# Consecutive examples whose prompts are put in order together: prompts of more are not held at once.
WINDOW = 256 * UNIT_EXAMPLES


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
        is_missing = reference.is_missing(self.rows.keys.only(np.concatenate(self.groups)))
        ends = np.cumsum([len(group) for group in self.groups])
        return self._only(np.split(is_missing, ends[:-1]))

    def firsts(self, is_first: np.ndarray) -> "WorkUnit":
        """The unit without the rows whose key an earlier row has; `is_first` is bool over the rows of the set."""
        return self._only([is_first[group] for group in self.groups])

    def _only(self, chosen: Sequence[np.ndarray]) -> "WorkUnit":
        groups = [group[mask] for group, mask in zip(self.groups, chosen, strict=True)]
        return WorkUnit(self.rows, [group for group in groups if len(group)])


def units_of(row_sets: Sequence[RowSet], worker: Worker) -> Iterator[WorkUnit]:
    """This worker's units. A key belongs to the first unit that holds it, so the units of all workers are disjoint."""
    is_first = RowKeys.joined(rows.keys for rows in row_sets).is_first()
    begins = np.cumsum([0, *map(len, row_sets)])
    firsts_of = {
        id(rows): is_first[begin:][: len(rows)] for rows, begin in zip(row_sets, begins, strict=False)
    }
    for number, unit in enumerate(_examples_alike(row_sets)):
        firsts = unit.firsts(firsts_of[id(unit.rows)])
        if firsts.groups and worker.does(number):
            yield firsts


def _examples_alike(row_sets: Sequence[RowSet]) -> Iterator[WorkUnit]:
    """All rows in units of `UNIT_EXAMPLES` examples in the order of their prompts; none goes across two row sets."""
    for rows in row_sets:
        for begin in range(0, rows.num_examples, WINDOW):
            prompts = [rows.prompt(row) for row in rows.starts[begin : begin + WINDOW]]
            for unit in in_units(prompts, UNIT_EXAMPLES):
                examples = [begin + number for number in unit]
                yield WorkUnit(
                    rows, [np.arange(rows.starts[example], rows.ends[example]) for example in examples]
                )
