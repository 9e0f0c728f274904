"""What a run's logged steps say about it: the best evaluation so far, and whether to stop early.

In: the lines of `metrics.jsonl` up to now, which every rank holds. Pure functions, so a resumed run decides
as the uninterrupted one did.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cache.errors import UsageError

Line = Mapping[str, Any]
# Of these the larger value is the better one; of every other metric the smaller.
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
    """The best evaluation of a metric: at which step, its value, and how many evaluations came after it."""

    step: int
    value: float
    evaluations_since: int


def eval_name(metric: str) -> str:
    """A metric as it stands in the log: `eval/` in front, as the user may or may not have written it."""
    return metric if metric.startswith("eval/") else f"eval/{metric}"


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of the metric is the better one."""
    return metric.endswith(HIGHER_IS_BETTER) or "/accuracies/" in metric


def best_evaluation(history: Sequence[Line], metric: str) -> Best | None:
    """The best evaluation after step 0; the earlier of equals. None before there is one."""
    name = eval_name(metric)
    seen = [(line["step"], line[name]) for line in history if line["step"] > 0 and line.get(name) is not None]
    if not seen:
        return None
    sign = -1.0 if higher_is_better(name) else 1.0
    place = min(range(len(seen)), key=lambda index: (sign * seen[index][1], index))
    return Best(*seen[place], evaluations_since=len(seen) - 1 - place)


def check_metric(history: Sequence[Line], metric: str | None, key: str) -> None:
    """Raise `UsageError` when the evaluation at step 0 does not have the metric that `key` names, if it names one."""
    if metric is None:
        return
    known = sorted(name for line in history[:1] for name in line if name.startswith("eval/"))
    if eval_name(metric) not in known:
        names = (
            ", ".join(name.removeprefix("eval/") for name in known) or "none: there are no held-out examples"
        )
        raise UsageError(
            f"{key} is {metric!r}, which no evaluation has. Held-out metrics of this run: {names}."
        )
