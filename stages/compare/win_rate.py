"""The win-rate of a model against a baseline, with a bootstrap interval over prompts, and the position bias of the judge.

In: `Outcome`s. Out: a share from 0 to 1: wins plus half of the ties, divided by the pairs with a preference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.compare.verdicts import TIE, Outcome

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class WinRate:
    """Wins, ties and losses, and the share (wins + ties / 2) / pairs with its 95 % interval.

    `without_verdict` pairs are in no share.
    """

    wins: int
    ties: int
    losses: int
    without_verdict: int
    rate: float
    low: float
    high: float


def win_rate(outcomes: Sequence[Outcome], seed: int = 0) -> WinRate:
    """The win-rate of pairs of which at least one has a preference.

    The interval is the percentile bootstrap (Efron 1979) over prompts: all samples and turns of a prompt are drawn
    together, because they are not independent.
    """
    decided = [outcome for outcome in outcomes if outcome.preference is not None]
    preferences = np.array([outcome.preference for outcome in decided])
    low, high = interval(preferences, [outcome.completion.question for outcome in decided], seed)
    return WinRate(
        wins=int((preferences == 1).sum()),
        ties=int((preferences == TIE).sum()),
        losses=int((preferences == 0).sum()),
        without_verdict=len(outcomes) - len(decided),
        rate=float(preferences.mean()),
        low=low,
        high=high,
    )


def interval(values: np.ndarray, prompts: Sequence[str], seed: int) -> tuple[float, float]:
    """The 95 % interval of the mean of `values` (shape (num_values,)); `prompts` names the prompt of each value."""
    _, places = np.unique(np.array(prompts), return_inverse=True)
    sums, counts = np.bincount(places, values), np.bincount(places)
    generator, means = np.random.default_rng(seed), []
    # One resample after the other, so that memory stays small for any number of prompts.
    for _ in range(RESAMPLES):
        drawn = generator.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class PositionBias:
    """How a judge treats the first of two texts, in pairs that it was asked in both orders.

    first_wins: share of the verdicts other than ties that are for the text shown first; 0.5 is no bias. None without such.
    disagreements: pairs of which the two orders have different winners, or one of them a tie.
    """

    pairs: int
    first_wins: float | None
    disagreements: int


def position_bias(outcomes: Sequence[Outcome]) -> PositionBias | None:
    """The position bias; None where no pair was asked in both orders."""
    both = [outcome for outcome in outcomes if outcome.both_orders]
    if not both:
        return None
    verdicts = [verdict for outcome in both for verdict in outcome.verdicts if verdict.preference != TIE]
    first = [(verdict.preference == 1) == (verdict.order == "completion_first") for verdict in verdicts]
    differ = [len({verdict.preference for verdict in outcome.verdicts}) == 2 for outcome in both]
    return PositionBias(len(both), sum(first) / len(first) if first else None, sum(differ))
