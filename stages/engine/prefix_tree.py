"""The tree of the tokens that rows begin with: every run of tokens that several rows share stands once.

In: rows of token ids.  Out: a `Tree`. Its tokens stand in the order of a walk along each branch to its end, so that what
follows a token in all of its rows is one stretch of positions. A *run* is what a row adds to those before it:

    row A  [ a z y x ]      positions  a z y x | c d | b
    row B  [ a z c d ]      runs       A from token 0, B from token 2, C from token 1
    row C  [ a b ]
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class Run(NamedTuple):
    """Tokens of one row: the position of the first, its place in the row, and their number.

    The tokens of the row before `place` are in earlier runs: each is the last one written at its place.
    """

    start: int
    place: int
    length: int


class Node(NamedTuple):
    """Tokens that the same rows share; what follows in these rows are the positions from its last one up to `end`."""

    start: int
    place: int
    length: int
    end: int


class Tree(NamedTuple):
    """`tokens` (positions,) of the runs, and for each row the positions of its tokens, (tokens of the row,) int64."""

    tokens: np.ndarray
    runs: tuple[Run, ...]
    rows: tuple[np.ndarray, ...]


def grow(rows: Sequence[np.ndarray]) -> Tree:
    """The tree of rows of token ids, int32; their order changes nothing but the order of `Tree.rows`."""
    row_at = np.zeros(max(map(len, rows), default=0), np.int64)  # positions of the tokens of the row at hand
    positions = [row_at] * len(rows)
    runs, tokens, size = [], [np.zeros(0, np.int32)], 0
    for number, branch in in_order(rows):
        row = rows[number]
        if length := len(row) - branch:
            runs.append(Run(size, branch, length))
            tokens.append(row[branch:])
            row_at[branch : len(row)] = np.arange(size, size + length)
            size += length
        positions[number] = row_at[: len(row)].copy()
    return Tree(np.concatenate(tokens), tuple(runs), tuple(positions))


def in_order(rows: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Row numbers in descending order of the tokens, each with the number of tokens shared with the row before it.

    Descending, because so a row that others go on from comes behind them and adds nothing.
    """
    # Big-endian bytes are in the order of the tokens, and compare faster.
    order = sorted(range(len(rows)), key=lambda number: rows[number].astype(">u4").tobytes(), reverse=True)
    pairs = itertools.pairwise(order)
    shared = [0, *(num_shared(rows[before], rows[after]) for before, after in pairs)]
    return list(zip(order, shared, strict=False))


def num_shared(left: np.ndarray, right: np.ndarray) -> int:
    """Number of tokens that two rows begin with."""
    shorter = min(len(left), len(right))
    differ = left[:shorter] != right[:shorter]
    return int(differ.argmax()) if differ.any() else shorter


def num_tokens(rows: Sequence[np.ndarray]) -> int:
    """Number of tokens of the tree of these rows."""
    return sum(map(len, rows)) - sum(shared for _, shared in in_order(rows))


class TreeIndex:
    """What attention needs to know of a tree, computed once for all layers."""

    def __init__(self, runs: Sequence[Run]) -> None:
        """`runs` are those of a pack."""
        self.runs = runs
        self.size = runs[-1].start + runs[-1].length
        self.longest = max(run.place + run.length for run in runs)
        self._found: dict[Any, Any] = {}

    def once(self, name: Any, find: Callable[[], T]) -> T:
        """What `find` returns, which is called once for each name."""
        if name not in self._found:
            self._found[name] = find()
        return self._found[name]

    @cached_property
    def nodes(self) -> list[Node]:
        """Its nodes, each behind those that follow it."""
        return _nodes_of(self.runs, self.size)

    @cached_property
    def places(self) -> np.ndarray:
        """The place of each position in its row: (positions,) int64."""
        return np.concatenate([run.place + np.arange(run.length) for run in self.runs])

    @cached_property
    def ends(self) -> np.ndarray:
        """For each position, the end of the positions that follow it in its rows: (positions,) int64."""
        ends = np.zeros(self.size, np.int64)
        for node in self.nodes:
            ends[node.start : node.start + node.length] = node.end
        return ends


def _nodes_of(runs: Iterable[Run], size: int) -> list[Node]:
    found: list[Node] = []
    open_runs: list[Run] = []  # what the next row may go on from: the beginnings of earlier runs
    for run in [*runs, Run(size, 0, 0)]:
        while open_runs and open_runs[-1].place + open_runs[-1].length > run.place:
            start, place, length = open_runs.pop()
            kept = max(0, run.place - place)
            found.append(Node(start + kept, place + kept, length - kept, run.start))
            if kept:
                open_runs.append(Run(start, place, kept))
        open_runs.append(run)
    return found
