"""Which queries of a pack share an attention call, and over which keys: functions of the tree and of a layer's rules.

Out: forward, calls over the keys of a row, gathered by writing each run once, over those of the row before it; backward,
calls over the keys of a node. They are the same in all layers of one kind, so they are found once for a pack.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.engine.prefix_tree import Node, Run, TreeIndex

# On a CPU, queries of one block of this many places of a row share a call, over the keys up to the end of their block,
# and the number of queries of a call is a multiple of `FEWEST`. The ends of matrix products round otherwise; so the
# float32 result of a token depends on its own row alone, to the bit, whatever rows are in its pack.
BLOCK = 64
FEWEST = 16
# Of so many keys at the multiples of this number, all queries that see them share a call, whatever rows they are in.
MANY_KEYS = 512
# Elsewhere: queries of a call.
LARGE_BLOCK = 512


@dataclass(frozen=True)
class Rules:
    """How a layer attends within a row.

    `scaling`: factor of the scores. `window`: the last places that a query sees. `chunk`: the length of blocks of the row
    that do not see each other. `softcap`: bound of the scores.
    """

    scaling: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None

    @property
    def limited(self) -> bool:
        """Whether a query may not see all places before it."""
        return self.window is not None or self.chunk is not None

    def all_visible(self, total: int) -> bool:
        """Whether a query of a row of `total` places sees every place up to its own."""
        return all(length is None or length >= total for length in (self.window, self.chunk))

    def first_key(self, query: int) -> int:
        """The first place that a query at this place sees."""
        behind_window = 0 if self.window is None else query - self.window + 1
        return max(0, behind_window, 0 if self.chunk is None else query // self.chunk * self.chunk)

    def last_query(self, key: int) -> int:
        """The last place that sees a key at this place."""
        of_window = sys.maxsize if self.window is None else key + self.window - 1
        of_chunk = sys.maxsize if self.chunk is None else (key // self.chunk + 1) * self.chunk - 1
        return min(of_window, of_chunk)

    def mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        """What queries see of keys at these places of their row: (queries, keys) float32, 0 or -inf."""
        distance = queries[:, None] - keys
        seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        if self.chunk is not None:
            seen &= queries[:, None] // self.chunk == keys // self.chunk
        return torch.zeros(seen.shape, device=keys.device).masked_fill_(~seen, float("-inf"))


class RowCall(NamedTuple):
    """`number` queries from position `start` on, filled up to `filled`, and the keys that they see, places of their row.

    `place`: that of the first query. `masked`: whether some of them do not see all of these keys. `is_first`: whether they
    saw no keys before.
    """

    start: int
    number: int
    filled: int
    keys: slice
    place: int
    masked: bool
    is_first: bool

    @property
    def shape(self) -> tuple[int, int, int, bool, bool]:
        """All that its memory depends on."""
        return self.number, self.filled, self.keys.stop - self.keys.start, self.masked, self.is_first


class NodeCall(NamedTuple):
    """Keys and the queries that may see them, positions; whether query n sees keys up to n; whether a mask is between them.

    `is_first`: whether no call before had any of these keys and queries.
    """

    keys: slice
    queries: slice
    causal: bool
    masked: bool
    is_first: bool

    @property
    def shape(self) -> tuple[int, int, bool, bool, bool]:
        """All that its memory depends on."""
        sizes = (side.stop - side.start for side in (self.keys, self.queries))
        return *sizes, self.causal, self.masked, self.is_first  # type: ignore[return-value]


class RowCalls(NamedTuple):
    """The forward calls of each run, in order; rows have up to `longest` places, in blocks of `block`.

    The number of queries of a call is filled up to a multiple of `fewest`.
    """

    runs: Sequence[tuple[Run, Sequence[RowCall]]]
    longest: int
    block: int
    fewest: int


def row_calls(tree: TreeIndex, rules: Rules, on_cpu: bool) -> RowCalls:
    """The calls of a forward pass."""
    return tree.once(("rows", rules, on_cpu), lambda: _row_calls(tree, rules, on_cpu))


def node_calls(tree: TreeIndex, rules: Rules, whole: bool) -> Sequence[NodeCall]:
    """The calls of a backward pass; `whole`: of any number of keys and queries."""
    return tree.once(
        ("nodes", rules, whole),
        lambda: [call for node in tree.nodes for call in _of_node(tree, node, rules, whole)],
    )


def _row_calls(tree: TreeIndex, rules: Rules, on_cpu: bool) -> RowCalls:
    block, fewest = (BLOCK, FEWEST) if on_cpu else (LARGE_BLOCK, 1)
    longest = -(-tree.longest // block) * block
    many = longest if rules.limited else MANY_KEYS
    runs = []
    for run in tree.runs:
        calls, row = [], slice(run.place, run.place + run.length)
        for begin in range(run.place // many * many, row.stop - many + 1, many):
            place = begin + many
            start = run.start + place - run.place
            if number := int(tree.ends[start - 1]) - start:
                keys = slice(begin, place)
                calls.append(RowCall(start, number, _filled(number, fewest), keys, place, False, not begin))
        for part in _cut(row, block):
            begin = part.start // block * block
            first = max(rules.first_key(begin), begin // many * many)
            keys = slice(first, begin + block if on_cpu else part.stop)
            start, number = run.start + part.start - run.place, part.stop - part.start
            is_first = rules.limited or begin < many
            calls.append(RowCall(start, number, _filled(number, fewest), keys, part.start, True, is_first))
        runs.append((run, calls))
    return RowCalls(runs, longest, block, fewest)


def _filled(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _cut(row: slice, block: int) -> Iterator[slice]:
    """Places of a row, cut at the multiples of `block`."""
    start = row.start
    while start < row.stop:
        stop = min(row.stop, (start // block + 1) * block)
        yield slice(start, stop)
        start = stop


def _of_node(tree: TreeIndex, node: Node, rules: Rules, whole: bool) -> Iterator[NodeCall]:
    most = tree.size if whole and not rules.limited else LARGE_BLOCK
    # From the end, so that the call of a query with its own keys comes before those with the keys before it.
    for start in reversed(range(node.start, node.start + node.length, most)):
        end = min(start + most, node.start + node.length)
        keys, plain = slice(start, end), rules.all_visible(end - start)
        yield NodeCall(keys, keys, plain, not plain, True)
        last = rules.last_query(int(tree.places[end - 1])) if rules.limited else sys.maxsize
        seeing = np.flatnonzero(tree.places[end : node.end] <= last)
        if len(seeing):
            stop = end + int(seeing[-1]) + 1
            for first in range(end + int(seeing[0]), stop, most):
                yield NodeCall(keys, slice(first, min(first + most, stop)), False, rules.limited, False)
