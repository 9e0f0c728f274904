"""Which rows of an example are compared: pairs as they came, or formed from the scores of a ranked list.

cache-ref scores every row of a ranked list; which of them form pairs is decided here, when training begins, so every
strategy reads the same rows and the same reference log-probs.
"""

from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np

from stages.data.rows import RowSet
from stages.settings.train import PairStrategy


def best_and_worst(scores: Sequence[float]) -> tuple[int, int]:
    """Indices of the highest and of the lowest score; of equal scores the first."""
    places = range(len(scores))
    return max(places, key=scores.__getitem__), min(places, key=scores.__getitem__)


def comparisons(scores: Sequence[float], strategy: PairStrategy) -> list[tuple[int, int]]:
    """Indices of the (better, worse) that a strategy compares, from the best down; equal scores included."""
    if strategy == "best_worst":
        return [best_and_worst(scores)]
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
    return list(pairwise(order) if strategy == "adjacent" else combinations(order, 2))


class Pairs:
    """The (better, worse) row numbers of each example of a split; unpaired feedback has none."""

    def __init__(self, rows: RowSet, strategy: PairStrategy) -> None:
        """Form pairs of the ranked rows of `rows` by `strategy`; chosen and rejected rows are pairs already."""
        self.rows = rows
        self.strategy: PairStrategy = strategy

    def of(self, example: int) -> np.ndarray:
        """Row numbers of the example's (better, worse) pairs without those of equal scores: shape (pairs, 2)."""
        pairs = self._compared(example)
        scores = self.rows.scores[pairs]
        is_tie = (self.rows.roles[pairs[:, 0]] == "ranked") & (scores[:, 0] == scores[:, 1])
        return pairs[~is_tie]

    def _compared(self, example: int) -> np.ndarray:
        rows = self.rows.example_rows(example, mismatched=False)
        roles = self.rows.roles[rows]
        ranked = rows[roles == "ranked"]
        if not len(ranked):
            return np.stack([rows[roles == "chosen"], rows[roles == "rejected"]], axis=1)
        return ranked[np.array(comparisons(self.rows.scores[ranked].tolist(), self.strategy))]

    def scored(self, example: int) -> np.ndarray:
        """Row numbers of the example that a step scores: those in a pair, or all of unpaired feedback."""
        pairs = self.of(example)
        if not len(pairs):
            return self.rows.example_rows(example, mismatched=False)
        return np.array(list(dict.fromkeys(pairs.ravel().tolist())))

    def among(self, numbers: np.ndarray) -> np.ndarray:
        """The pairs of the examples whose scored rows are `numbers`, as indices into `numbers`: int64, shape (pairs, 2)."""
        place = {int(row): index for index, row in enumerate(numbers)}
        examples = dict.fromkeys(self.rows.example_of(numbers).tolist())
        pairs = np.concatenate([self.of(example) for example in examples])
        return np.array([place[row] for row in pairs.ravel().tolist()], dtype=np.int64).reshape(-1, 2)

    def summary(self) -> str:
        """The number of pairs formed from ranked lists, in one line; "" where there are no ranked lists."""
        ranked = np.unique(self.rows.example_of(np.flatnonzero(self.rows.roles == "ranked")))
        if not len(ranked):
            return ""
        formed = sum(len(self.of(example)) for example in ranked)
        compared = sum(len(self._compared(example)) for example in ranked)
        return (
            f"Ranked lists: {formed:,} pairs ({self.strategy}) from {len(ranked):,} training examples, "
            f"{compared - formed:,} pairs of equal scores left out"
        )
