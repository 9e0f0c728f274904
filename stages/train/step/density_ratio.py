"""Density-ratio weights for unpaired data whose desirable and undesirable completions have different prompts.

In: the rows of a split.  Out: one weight for each row. A loss that classifies completions may learn to tell the prompts
apart instead. The weight p / (1 - p) of an undesirable row, where p is the probability that a completion of its prompt
is desirable, makes the prompts of both kinds equally distributed (BCO's underlying distribution matching, arXiv
2404.04656, section 4).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from cache.errors import DataError
from stages.data.rows import RowSet

NUM_FEATURES = 2**14
# Bounds of a weight, as in TRL.
SMALLEST, LARGEST = 0.5, 10.0


class DensityRatios:
    """Weights of undesirable rows, from a classifier of prompts that is fitted once, on the training rows."""

    def __init__(self, rows: RowSet) -> None:
        """Fit on the desirable and undesirable rows of `rows`; raises `DataError` if one kind is missing."""
        from sklearn.linear_model import LogisticRegression

        numbers = np.flatnonzero(np.isin(rows.roles, ("desirable", "undesirable")))
        labels = rows.roles[numbers] == "desirable"
        if labels.all() or not labels.any():
            raise DataError(
                f"The training rows have {labels.sum():,} desirable and {(~labels).sum():,} undesirable completions; loss.udm "
                f"compares the prompts of both. Leave loss.udm out, or add completions of the other kind."
            )
        # TRL embeds the prompts with a model and fits on a random sample of them. Hashed tokens need no model, and p is
        # a function of the training rows alone.
        classifier = LogisticRegression(class_weight="balanced", max_iter=1000)
        self._classifier = classifier.fit(_features(rows, numbers), labels)

    def of(self, rows: RowSet) -> np.ndarray:
        """The weight of each row, (rows,), float32: the density ratio of an undesirable row's prompt, 1 for other rows."""
        ratios = np.ones(len(rows), dtype=np.float32)
        numbers = np.flatnonzero(rows.roles == "undesirable")
        if len(numbers):
            desirable = self._classifier.predict_proba(_features(rows, numbers))[:, 1]
            ratios[numbers] = np.clip(desirable / (1 - desirable + 1e-8), SMALLEST, LARGEST)
        return ratios


def _features(rows: RowSet, numbers: np.ndarray) -> Any:
    """Hashed counts of tokens and token bigrams of the rows' prompts: sparse (len(numbers), features), rows of norm 1."""
    from sklearn.feature_extraction import FeatureHasher
    from sklearn.preprocessing import normalize

    hasher = FeatureHasher(NUM_FEATURES, input_type="string")
    return normalize(hasher.transform(_words(rows.prompt(row)) for row in numbers))


def _words(prompt: np.ndarray) -> Iterator[str]:
    ids = prompt.tolist()
    yield from (str(token) for token in ids)
    yield from (f"{first} {second}" for first, second in pairwise(ids))
