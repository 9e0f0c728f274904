"""Examples to shards: cycles of a few examples, in which each lends its completions to another.

In: the examples of one split, in order. Out: shards `<split>-00000.arrow` of about 2,048 examples, with
KTO's mismatched rows added. Only the shard in hand is in memory.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from cache.artifacts import Draft
from stages.data.pairs import best_and_worst
from stages.data.rows import Example, Row, to_table
from stages.formats import Candidate
from stages.prepare.counts import Report
from stages.settings.data import PrepareSettings

SHARD_EXAMPLES = 2048
# Examples whose completions rotate to make each other's mismatched rows; small, so that an optimizer
# step of any usual size holds whole cycles.
CYCLE = 4
Value = TypeVar("Value")


def compared(entries: Sequence[Candidate] | Sequence[Row], values: Sequence[Value]) -> Sequence[Value]:
    """The values of the best and the worst entry of a ranked list; of other examples one, or a pair (a tie has it twice)."""
    scores = [entry.score for entry in entries if entry.role == "ranked" and entry.score is not None]
    return [values[place] for place in best_and_worst(scores)] if scores else values[:2]


class SplitWriter:
    """Collects examples of one split into cycles, adds their mismatched rows, and writes shards."""

    def __init__(self, draft: Draft, split: str, settings: PrepareSettings, report: Report) -> None:
        self.draft, self.split, self.settings, self.report = draft, split, settings, report
        self.pending: list[Example] = []
        self.done: list[Example] = []
        self.cycles: list[int] = []
        self.num_cycles = 0
        self.num_shards = 0

    def add(self, example: Example) -> None:
        """Take the next example; a cycle closes once two are in hand (so that none is left alone)."""
        self.pending.append(example)
        if len(self.pending) == 2 * CYCLE:
            self._close(self.pending[:CYCLE])
            del self.pending[:CYCLE]

    def finish(self) -> None:
        """Close what is left and write the last shard."""
        middle = CYCLE if len(self.pending) >= CYCLE + 2 else len(self.pending)
        for cycle in (self.pending[:middle], self.pending[middle:]):
            if cycle:
                self._close(cycle)
        self._write()

    def _close(self, cycle: list[Example]) -> None:
        if self.settings.mismatched:
            self._add_mismatched(cycle)
        self.done += cycle
        self.cycles += [self.num_cycles] * len(cycle)
        self.num_cycles += 1
        if len(self.done) >= SHARD_EXAMPLES:
            self._write()

    def _add_mismatched(self, cycle: list[Example]) -> None:
        """Give each example the completions of another one in the cycle, one with another prompt.

        A ranked list gives its best and its worst, as a pair does.
        """
        prompts = [example.prompt_ids.tolist() for example in cycle]
        matched = [list(compared(example.rows, example.rows)) for example in cycle]
        for index, donor in enumerate(_donors(prompts)):
            if donor is None:
                continue
            example = cycle[index]
            room = self.settings.max_length - len(example.prompt_ids)
            example.rows += [
                Row("mismatched", row.ids[:room], row.mask[:room], cut=row.cut + max(0, len(row.ids) - room))
                for row in matched[donor]
                if row.mask[:room].any()
            ]

    def _write(self) -> None:
        if not self.done:
            return
        self.report.write(self.split, self.done)
        self.draft.write_shard(f"{self.split}-{self.num_shards:05d}.arrow", to_table(self.done, self.cycles))
        self.num_shards += 1
        self.done, self.cycles = [], []


def _donors(prompts: Sequence[Any]) -> list[int | None]:
    """For each example of a cycle, the one whose completions are its mismatched rows.

    The next one, or, where neighbours share a prompt, the nearest rotation in which none meets its own,
    so that every completion serves once. Where no rotation does, whichever comes next with another prompt.
    """
    count = len(prompts)
    for step in range(1, count):
        donors = [(index + step) % count for index in range(count)]
        if all(prompts[index] != prompts[donor] for index, donor in enumerate(donors)):
            return list(donors)
    others = [
        [
            (index + step) % count
            for step in range(1, count)
            if prompts[(index + step) % count] != prompts[index]
        ]
        for index in range(count)
    ]
    return [found[0] if found else None for found in others]
