"""Density-ratio weights for unpaired data whose desirable and undesirable completions have different prompts.

In: the rows of a split.  Out: one weight for each row. A loss that classifies completions may learn to tell the prompts
apart instead. The weight p / (1 - p) of an undesirable row, where p is the probability that a completion of its prompt
is desirable, makes the prompts of both kinds equally distributed (BCO's underlying distribution matching, arXiv
2404.04656, section 4).

A classifier knows the labels of the rows it was fitted on and makes their ratios too small, so p is cross-fitted: the
prompts are divided into folds, and a classifier predicts for the fold that it was not fitted on.
"""

from collections.abc import Iterator
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np

from cache.errors import DataError
from stages.data.rows import RowSet

NUM_FEATURES = 2**14
# Bounds of a weight, as in TRL.
SMALLEST, LARGEST = 0.5, 10.0
NUM_FOLDS = 5


class DensityRatios:
    """Weights of undesirable rows, from classifiers of prompts that are fitted once, on the training rows."""

    def __init__(self, rows: RowSet) -> None:
        """Fit on the desirable and undesirable rows of `rows`; raises `DataError` for fewer than two prompts of a kind."""
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
        """The weight of each row, (rows,), float32: the density ratio of an undesirable row's prompt, 1 for other rows.

        A training prompt has the ratio of the classifier that was not fitted on it, any other prompt the mean ratio of
        all classifiers, so the ratios of training and of held-out rows have the same distribution.
        """
        ratios = np.ones(len(rows), dtype=np.float32)
        numbers = np.flatnonzero(rows.roles == "undesirable")
        if not len(numbers):
            return ratios
        features = _features(rows, numbers)
        desirable = np.stack(
            [classifier.predict_proba(features)[:, 1] for classifier in self._classifiers], axis=1
        )
        by_fold = np.clip(desirable / (1 - desirable + 1e-8), SMALLEST, LARGEST)
        for index, row in enumerate(numbers):
            fold = self._fold_of.get(_digest(rows.prompt(row)))
            ratios[row] = by_fold[index].mean() if fold is None else by_fold[index, fold]
        return ratios


def _folds(labels: np.ndarray, prompts: list[bytes]) -> np.ndarray:
    """The fold of each row, (rows,): the rows of a prompt are in one fold, and each fold has prompts of both labels."""
    labels_of: dict[bytes, set[bool]] = {}
    for prompt, label in zip(prompts, labels.tolist(), strict=True):
        labels_of.setdefault(prompt, set()).add(label)
    undesirable, desirable = (sum(label in found for found in labels_of.values()) for label in (False, True))
    if min(desirable, undesirable) < 2:
        raise DataError(
            f"The training rows have {desirable:,} prompts with desirable and {undesirable:,} with undesirable completions; "
            f"loss.udm compares two or more of each. Leave loss.udm out, or add completions of the other kind."
        )
    # Undesirable, both, desirable: prompts of one label are neighbours, which are never in the same fold, so a
    # classifier is always fitted on both labels.
    order = sorted(labels_of, key=lambda prompt: (True in labels_of[prompt]) - (False in labels_of[prompt]))
    count = min(NUM_FOLDS, desirable, undesirable)
    fold_of = {prompt: index % count for index, prompt in enumerate(order)}
    return np.array([fold_of[prompt] for prompt in prompts])


def _fit(features: Any, labels: np.ndarray) -> Any:
    # TRL embeds the prompts with a model, fits on a random sample of them and predicts for the sample too. Hashed tokens
    # need no model, and p is a function of the training rows alone.
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(class_weight="balanced", max_iter=1000).fit(features, labels)


def _digest(prompt: np.ndarray) -> bytes:
    return blake2b(prompt.tobytes(), digest_size=16).digest()


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
