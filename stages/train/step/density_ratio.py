"""Density-ratio weights of unpaired data: how much more the prompts of good answers look like this one.

Where good and bad answers were given to different prompts, a classifier of answers may learn to tell the
prompts apart. Weighting each bad answer by p / (1 - p), p the probability that an answer to its prompt is
good, makes the prompts of the bad answers count as those of the good ones do (arXiv 2404.04656, section 4).

p is a logistic regression on the prompt's tokens and pairs of neighbouring tokens, hashed: no model is
loaded for it, and it is a function of the training rows alone. A classifier that is asked about a row it was
fitted on knows that row's label and puts the ratio too low, so p is cross-fitted: the prompts are split into
parts, and each part is judged by the classifier of the others. TRL embeds prompts with a model, fits on a
random sample of them and judges those too.
"""

from collections.abc import Iterator
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np

from cache.errors import DataError
from stages.data.rows import RowSet

NUM_FEATURES = 2**14
# TRL's: a prompt that looks like no good answer's still counts half, and none counts more than ten times.
SMALLEST, LARGEST = 0.5, 10.0
NUM_FOLDS = 5


class DensityRatios:
    """Weights of undesirable rows, from classifiers of prompts fitted once on a split."""

    def __init__(self, rows: RowSet) -> None:
        """Fit on the desirable and undesirable rows of `rows`; raises `DataError` where prompts of a kind are few."""
        numbers = np.flatnonzero(np.isin(rows.roles, ("desirable", "undesirable")))
        labels = rows.roles[numbers] == "desirable"
        prompts = [_digest(rows.prompt(row)) for row in numbers]
        folds = _folds(labels, prompts)
        features = _features(rows, numbers)
        self._fold_of = dict(zip(prompts, folds.tolist(), strict=True))
        self._classifiers = [
            _fit(features[folds != fold], labels[folds != fold]) for fold in range(folds.max() + 1)
        ]

    def of(self, rows: RowSet) -> np.ndarray:
        """float32, one entry per row: the density ratio of an undesirable row's prompt; 1 for all others.

        A prompt that the classifiers were fitted on is judged by the one that did not see it; any other by all,
        and the mean of their ratios taken, so that training and held-out rows have ratios of one kind.
        """
        ratios = np.ones(len(rows), dtype=np.float32)
        numbers = np.flatnonzero(rows.roles == "undesirable")
        if not len(numbers):
            return ratios
        features = _features(rows, numbers)
        good = np.stack(
            [classifier.predict_proba(features)[:, 1] for classifier in self._classifiers], axis=1
        )
        found = np.clip(good / (1 - good + 1e-8), SMALLEST, LARGEST)
        for place, row in enumerate(numbers):
            fold = self._fold_of.get(_digest(rows.prompt(row)))
            ratios[row] = found[place].mean() if fold is None else found[place, fold]
        return ratios


def _folds(labels: np.ndarray, prompts: list[bytes]) -> np.ndarray:
    """Which part each row is in: prompts stay whole, and those of each kind are dealt out in turn."""
    kinds: dict[bytes, set[bool]] = {}
    for prompt, label in zip(prompts, labels.tolist(), strict=True):
        kinds.setdefault(prompt, set()).add(label)
    num_bad, num_good = (sum(label in found for found in kinds.values()) for label in (False, True))
    if min(num_good, num_bad) < 2:
        raise DataError(
            f"loss.udm compares the prompts of desirable and undesirable completions, and the training rows have "
            f"{num_good:,} prompts with desirable and {num_bad:,} with undesirable ones; it takes two of each. "
            f"Leave loss.udm out, or add the other kind."
        )
    # Bad ones, then those of both kinds, then good ones: two neighbours are never in one part, so no part has
    # all of a kind.
    order = sorted(kinds, key=lambda prompt: (True in kinds[prompt]) - (False in kinds[prompt]))
    count = min(NUM_FOLDS, num_good, num_bad)
    fold_of = {prompt: place % count for place, prompt in enumerate(order)}
    return np.array([fold_of[prompt] for prompt in prompts])


def _fit(features: Any, labels: np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(class_weight="balanced", max_iter=1000).fit(features, labels)


def _digest(prompt: np.ndarray) -> bytes:
    return blake2b(prompt.tobytes(), digest_size=16).digest()


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
