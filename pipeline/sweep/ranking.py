"""Which setting of a sweep is best, and whether that is more than noise.

In: the held-out metrics of its trainings. Out: settings by their mean over seeds, best first, and a verdict.

The rule. Two things make a mean uncertain: seeds (variance of the mean over seeds), and for a share such as the
accuracy the held-out examples (about p(1-p)/n, which more seeds do not lower). The first setting is the best if its mean differs
from that of every other by more than Welch's t-interval of both uncertainties, at 95 % for all comparisons together
(Bonferroni). Settings with one seed have no known spread, so none of them is called the best. All are measured on the same
examples, so their second uncertainties partly cancel: the rule errs on the side of noise.

Rewards are each loss's own. Margins and losses of different loss blocks, and accuracies of different rewards, are not
compared: the accuracy of a loss with a reference begins at 0.5, that of one without at what the untrained model has.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance
from typing import Any

LEVEL = 0.05
ACCURACY = "rewards/accuracies"
SHARES = (ACCURACY, "win_rate")


@dataclass(frozen=True)
class Trial:
    """One finished training: its setting, the values of the keys that vary, and its metrics by name.

    `sizes` has for a metric that is a share the number of examples or judged pairs that it was counted over. `loss` is the block
    of its loss.
    """

    setting: str
    values: Mapping[str, Any]
    metrics: Mapping[str, float]
    sizes: Mapping[str, int]
    loss: Mapping[str, Any]
    needs_reference: bool

    def reward(self, metric: str) -> str:
        """What a metric is measured by; values compare where this is equal."""
        if metric == ACCURACY:
            return "log-ratio" if self.needs_reference else str(self.loss["name"])
        return str(dict(self.loss)) if metric == "loss" or metric.startswith("rewards/") else ""


@dataclass(frozen=True)
class Setting:
    """The trainings of one setting, which differ in their seeds."""

    name: str
    values: Mapping[str, Any]
    trials: Sequence[Trial]

    def of(self, metric: str) -> list[float]:
        """The values of a metric, one for each training that has it."""
        return [trial.metrics[metric] for trial in self.trials if metric in trial.metrics]

    def mean(self, metric: str) -> float | None:
        """The mean over seeds."""
        values = self.of(metric)
        return fmean(values) if values else None

    def spread(self, metric: str) -> float | None:
        """The standard deviation over seeds; None with fewer than two."""
        values = self.of(metric)
        return stdev(values) if len(values) > 1 else None

    def parts(self, metric: str) -> list[tuple[float, float]]:
        """`(variance of the mean, degrees of freedom)` by seeds, and by held-out examples for a share."""
        values = self.of(metric)
        found = [(variance(values) / len(values), len(values) - 1.0)]
        sizes = [trial.sizes[metric] for trial in self.trials if metric in trial.sizes]
        if metric in SHARES and sizes and min(sizes) > 1:
            # Agresti and Coull (1998): four examples more, half of them right, or a share of 1 had no uncertainty.
            number = min(sizes) + 4
            share = (fmean(values) * min(sizes) + 2) / number
            found.append((share * (1 - share) / number, number - 1.0))
        return found


@dataclass(frozen=True)
class Ranking:
    """Settings, best first; `close` are the others that are within noise of the first, `verdict` says so in one line."""

    metric: str
    settings: Sequence[Setting]
    close: Sequence[str]
    best: str | None
    verdict: str


def rank(trials: Sequence[Trial], metric: str, higher_is_better: bool) -> Ranking:
    """Rank the settings by their mean of `metric`; trainings without it are left out."""
    by_name: dict[str, list[Trial]] = {}
    for trial in trials:
        if metric in trial.metrics:
            by_name.setdefault(trial.setting, []).append(trial)
    settings = [Setting(name, own[0].values, own) for name, own in by_name.items()]
    sign = -1 if higher_is_better else 1
    settings.sort(key=lambda setting: sign * fmean(setting.of(metric)))
    return _judged(metric, settings)


def _judged(metric: str, settings: Sequence[Setting]) -> Ranking:
    if len(settings) < 2:
        return Ranking(
            metric, settings, [], None, "Nothing to compare: fewer than two settings are finished."
        )
    if len({trial.reward(metric) for one in settings for trial in one.trials}) > 1:
        verdict = (
            f"No setting is called the best: the rewards of these losses are of different kinds, so {metric} does not compare. "
            f"Name a judge and add --set sweep.metric=win_rate, or compare the change of the log-probs."
        )
        return Ranking(metric, settings, [], None, verdict)
    first, *others = settings
    single = [one.name for one in settings if len(one.of(metric)) < 2]
    if single:
        verdict = (
            f"No setting is called the best: {len(single)} of {len(settings)} settings have one seed, so the spread is not "
            f"known. Add seeds: --set sweep.seeds=[0,1,2]"
        )
        return Ranking(metric, settings, [one.name for one in others], None, verdict)
    gaps = {
        other.name: (abs(_gap(first, other, metric)), margin(first, other, metric, len(others)))
        for other in others
    }
    close = [name for name, (gap, noise) in gaps.items() if not gap > noise]
    if close:
        gap, noise = gaps[close[0]]
        verdict = (
            f"No setting is called the best: the first and {len(close)} of the other {len(others)} are within noise "
            f"(the nearest of them: {gap:.4f} apart, noise {noise:.4f})."
        )
        return Ranking(metric, settings, close, None, verdict)
    gap, noise = gaps[others[0].name]
    verdict = f"Best: {first.name} ({gap:.4f} from the next, noise {noise:.4f}, 95 %)."
    return Ranking(metric, settings, [], first.name, verdict)


def _gap(one: Setting, other: Setting, metric: str) -> float:
    return fmean(one.of(metric)) - fmean(other.of(metric))


def margin(one: Setting, other: Setting, metric: str, comparisons: int) -> float:
    """The half-width of Welch's interval for the difference of two means, at 95 % for all `comparisons` together."""
    from scipy.stats import t

    parts = [*one.parts(metric), *other.parts(metric)]
    total = sum(part for part, _ in parts)
    if total == 0:
        return 0.0
    # Welch-Satterthwaite: the degrees of freedom of a sum of estimated variances.
    freedom = total**2 / sum(part**2 / degrees for part, degrees in parts)
    return float(t.ppf(1 - LEVEL / (2 * comparisons), freedom)) * math.sqrt(total)
