"""The best evaluation so far, for early stopping and for publishing the best weights.

In: the lines of `metrics.jsonl` so far, which every rank has.  Out: step, value and age of the best evaluation. Pure
functions, so a resumed run decides as an uninterrupted one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cache.errors import UsageError

Line = Mapping[str, Any]
# For these metrics a larger value is better, for every other metric a smaller one.
HIGHER_IS_BETTER = (
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "logps/chosen",
    "logratios/chosen",
    "log_odds_ratio",
)


@dataclass(frozen=True)
class Best:
    """The best evaluation by a metric: its step, its value, and the number of evaluations after it."""

    step: int
    value: float
    evaluations_since: int


def eval_name(metric: str) -> str:
    """The name of a held-out metric in the log, which begins with `eval/`; in the configuration it may or may not."""
    return metric if metric.startswith("eval/") else f"eval/{metric}"


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of the metric is better."""
    return metric.endswith(HIGHER_IS_BETTER) or "/accuracies/" in metric


def best_evaluation(history: Sequence[Line], metric: str) -> Best | None:
    """The best evaluation after step 0, the earlier one among equals; None if there is none yet."""
    name = eval_name(metric)
    seen = [(line["step"], line[name]) for line in history if line["step"] > 0 and line.get(name) is not None]
    if not seen:
        return None
    sign = -1.0 if higher_is_better(name) else 1.0
    place = min(range(len(seen)), key=lambda index: (sign * seen[index][1], index))
    return Best(*seen[place], evaluations_since=len(seen) - 1 - place)


def check_metric(history: Sequence[Line], metric: str | None, key: str) -> None:
    """Raise `UsageError` if the evaluation at step 0 lacks `metric`, the value of the configuration key `key`."""
    # Known only then: which metrics an evaluation has depends on the loss and on the held-out rows.
    if metric is None:
        return
    known = sorted(name for line in history[:1] for name in line if name.startswith("eval/"))
    if eval_name(metric) not in known:
        names = (
            ", ".join(name.removeprefix("eval/") for name in known) or "none: there are no held-out examples"
        )
        raise UsageError(
            f"{key} is {metric!r}, which is not a held-out metric of this run. Its held-out metrics: {names}."
        )
