"""The win-rate that would be expected if both completions were equally long.

In: `Outcome`s. Out: a share from 0 to 1, or the reason why there is none. A logistic regression of the preference on the
difference in length, in characters and divided by its standard deviation, as in AlpacaEval 2 (arXiv 2404.04475) without
that paper's terms for models and instructions; the rate is its value at the difference 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.compare.verdicts import Outcome

MIN_PAIRS = 10


@dataclass(frozen=True)
class LengthControlled:
    """The rate at equal length, and the slope for one standard deviation; both None where `problem` says why."""

    rate: float | None = None
    slope: float | None = None
    problem: str | None = None


def length_controlled(outcomes: Sequence[Outcome]) -> LengthControlled:
    """The length-controlled win-rate; a tie counts as half a win and half a loss."""
    decided = [outcome for outcome in outcomes if outcome.preference is not None]
    preferences = np.array([outcome.preference for outcome in decided], dtype=float)
    longer = np.array(
        [len(pair.completion.completion) - len(pair.baseline.completion) for pair in decided], dtype=float
    )
    problem = _problem(preferences, longer)
    if problem:
        return LengthControlled(problem=problem)
    return LengthControlled(*_fit(preferences, longer / longer.std()))


def _problem(preferences: np.ndarray, longer: np.ndarray) -> str | None:
    """Why there is no finite fit."""
    if len(preferences) < MIN_PAIRS:
        return f"fewer than {MIN_PAIRS} pairs have a verdict"
    if longer.std() == 0:
        return "all pairs have the same difference in length"
    won, lost = longer[preferences > 0], longer[preferences < 1]
    if not len(won) or not len(lost):
        return "one side won every pair"
    if won.min() >= lost.max() or won.max() <= lost.min():
        return "the difference in length alone decides every pair"
    return None


def _fit(preferences: np.ndarray, differences: np.ndarray) -> tuple[float, float]:
    """Rate at 0 and slope of the logistic regression; each pair is a win and a loss, weighted by its preference."""
    from sklearn.linear_model import LogisticRegression

    features = np.concatenate([differences, differences])[:, None]
    won = np.repeat([1, 0], len(differences))
    weights = np.concatenate([preferences, 1 - preferences])
    kept = weights > 0
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
    model.fit(features[kept], won[kept], sample_weight=weights[kept])
    return float(1 / (1 + np.exp(-model.intercept_[0]))), float(model.coef_[0, 0])
