"""Examples to shards of one split, with KTO's mismatched rows added.

In: examples in order. Out: Arrow files `<split>-00000.arrow` of about 2,048 examples. Only the shard being filled is in
memory.
"""

from collections.abc import Sequence

from cache.artifacts import Draft
from stages.data.rows import Example, to_table
from stages.prepare.counts import RowCounts
from stages.prepare.mismatched import WINDOW_EXAMPLES, add_mismatched, in_order, with_other_prompts
from stages.settings.data import PrepareSettings

SHARD_EXAMPLES = 2048


class SplitWriter:
    """Collects the examples of a split into mismatch groups and writes them in shards."""

    def __init__(self, draft: Draft, split: str, settings: PrepareSettings, counts: RowCounts) -> None:
        self.draft, self.split, self.settings, self.counts = draft, split, settings, counts
        self.pending: list[Example] = []
        self.grouped: list[Example] = []
        self.groups: list[int] = []  # the mismatch group of each grouped example
        self.num_groups = 0
        self.num_shards = 0

    def add(self, example: Example) -> None:
        """Take the next example; a window closes once two of them are waiting, so that none is left alone at the end."""
        self.pending.append(example)
        if len(self.pending) == 2 * WINDOW_EXAMPLES:
            self._close(self.pending[:WINDOW_EXAMPLES])
            del self.pending[:WINDOW_EXAMPLES]

    def finish(self) -> None:
        """Close the window that is left and write the last shard."""
        self._close(self.pending)
        self._write()

    def _close(self, window: Sequence[Example]) -> None:
        for group in with_other_prompts(window) if self.settings.mismatched else in_order(window):
            if self.settings.mismatched:
                add_mismatched(group, self.settings.max_length)
            self.grouped += group
            self.groups += [self.num_groups] * len(group)
            self.num_groups += 1
            if len(self.grouped) >= SHARD_EXAMPLES:
                self._write()

    def _write(self) -> None:
        if not self.grouped:
            return
        self.counts.write(self.split, self.grouped)
        self.draft.write_shard(
            f"{self.split}-{self.num_shards:05d}.arrow", to_table(self.grouped, self.groups)
        )
        self.num_shards += 1
        self.grouped, self.groups = [], []
