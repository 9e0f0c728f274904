"""What is worth a chart, and the points of a run in it.

In: the lines of `metrics.jsonl`. Out: steps and values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Line = Mapping[str, Any]
Points = tuple[list[int], list[float]]
SMOOTHING = 25  # a training curve is averaged over this share of its length, 1/25


@dataclass(frozen=True)
class Chart:
    """One chart: a held-out metric as a line with a point for each evaluation, or a metric of each step.

    `training` is the metric of the steps that is drawn faintly behind a held-out one. `note` says how to read it.
    """

    name: str
    title: str
    metric: str
    training: str | None = None
    note: str = ""
    log: bool = False

    @property
    def is_line_of_evaluations(self) -> bool:
        """Whether it has a point for each evaluation, not for each step."""
        return self.metric.startswith(("eval/", "logps_change/"))


CHARTS = (
    Chart("accuracy", "held-out accuracy", "eval/rewards/accuracies", "rewards/accuracies", "share of pairs whose chosen completion has the larger reward; the band is its 95 % interval over the held-out examples"),
    Chart("margin", "held-out margin", "eval/rewards/margins", "rewards/margins", "chosen minus rejected reward; it grows with beta, so compare it within one beta"),
    Chart("loss", "held-out loss", "eval/loss", "loss", "losses of different kinds or betas have different scales"),
    Chart("chosen", "chosen log-ratio (nats)", "logps_change/chosen", None, "change of the log-prob of the held-out chosen completions; for a policy that starts as the reference it is the log-ratio"),
    Chart("rejected", "rejected log-ratio (nats)", "logps_change/rejected", None, "the same for the rejected ones; both often fall, and the margin grows while rejected falls faster"),
    Chart("kl", "KL estimate (nats)", "eval/kl", "kl", "the reference point of kto: mean log-ratio of mismatched completions, not below 0"),
    Chart("length", "length bias", "eval/length_bias", None, "correlation of the margin with the difference in length; towards 1 the policy learns length"),
    Chart("grad_norm", "gradient norm", "grad_norm", None, "before clipping, each step", log=True),
    Chart("learning_rate", "learning rate", "learning_rate", None, "each step"),
)  # fmt: skip
# Those of the small picture of a model card and of a sweep.
MAIN = tuple(chart for chart in CHARTS if chart.name in ("accuracy", "margin", "chosen", "rejected"))


def points(lines: Sequence[Line], metric: str) -> Points:
    """Steps and values of a metric, where it was logged and finite; `logps_change/SIDE` is computed."""
    if metric.startswith("logps_change/"):
        steps, values = points(lines, f"eval/logps/{metric.rpartition('/')[2]}")
        return steps, [value - values[0] for value in values]
    found = [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
    return [step for step, _ in found], [float(value) for _, value in found]


def smoothed(found: Points) -> Points:
    """The running mean of a noisy curve."""
    steps, values = found
    width = max(1, len(values) // SMOOTHING)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for place in range(len(values)):
        low, high = max(0, place - width), min(len(values), place + width + 1)
        means.append((sums[high] - sums[low]) / (high - low))
    return steps, means


def wilson(share: float, number: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of `number` examples (Wilson 1927), which stays within 0 and 1."""
    if number == 0:
        return 0.0, 1.0
    centre = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return max(0.0, centre - half), min(1.0, centre + half)
