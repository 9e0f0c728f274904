"""Density-ratio weights of unpaired data: how much more the prompts of good answers look like this one.

Where good and bad answers were given to different prompts, a classifier of answers may learn to tell the
prompts apart. Weighting each bad answer by p / (1 - p), p the probability that an answer to its prompt is
good, makes the prompts of the bad answers count as those of the good ones do (arXiv 2404.04656, section 4).

p is a logistic regression on the prompt's tokens and pairs of neighbouring tokens, hashed: no model is
loaded for it, and it is a function of the training rows alone. TRL embeds prompts with a model and fits on
a random sample of them.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from cache.errors import DataError
from stages.data.rows import RowSet

NUM_FEATURES = 2**14
# TRL's: a prompt that looks like no good answer's still counts half, and none counts more than ten times.
SMALLEST, LARGEST = 0.5, 10.0


class DensityRatios:
    """Weights of undesirable rows, from a classifier of prompts fitted once on a split."""

    def __init__(self, rows: RowSet) -> None:
        """Fit on the desirable and undesirable rows of `rows`; raises `DataError` where one kind is missing."""
        from sklearn.linear_model import LogisticRegression

        numbers = np.flatnonzero(np.isin(rows.roles, ("desirable", "undesirable")))
        labels = rows.roles[numbers] == "desirable"
        if labels.all() or not labels.any():
            raise DataError(
                f"loss.udm compares the prompts of desirable and undesirable completions, and the training rows have "
                f"{labels.sum():,} desirable and {(~labels).sum():,} undesirable. Leave loss.udm out, or add the other kind."
            )
        classifier = LogisticRegression(class_weight="balanced", max_iter=1000)
        self._classifier = classifier.fit(_features(rows, numbers), labels)

    def of(self, rows: RowSet) -> np.ndarray:
        """float32, one entry per row: the density ratio of an undesirable row's prompt; 1 for all others."""
        ratios = np.ones(len(rows), dtype=np.float32)
        numbers = np.flatnonzero(rows.roles == "undesirable")
        if len(numbers):
            good = self._classifier.predict_proba(_features(rows, numbers))[:, 1]
            ratios[numbers] = np.clip(good / (1 - good + 1e-8), SMALLEST, LARGEST)
        return ratios


def _features(rows: RowSet, numbers: np.ndarray) -> Any:
    """Sparse counts of hashed words of the rows' prompts, each row of length 1."""
    from sklearn.feature_extraction import FeatureHasher
    from sklearn.preprocessing import normalize

    hasher = FeatureHasher(NUM_FEATURES, input_type="string")
    return normalize(hasher.transform(_words(rows.prompt(row)) for row in numbers))


def _words(prompt: np.ndarray) -> Iterator[str]:
    ids = prompt.tolist()
    yield from (str(token) for token in ids)
    yield from (f"{first} {second}" for first, second in pairwise(ids))
