"""Warnings when a run leaves healthy ranges: pure functions of the lines logged so far.

Each check looks at the newest lines and returns one sentence, or nothing. docs/metrics.md holds the same
ranges as a table. None of them stops a run: they say early what an experienced eye would see in the curves.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

Line = Mapping[str, Any]
WINDOW = 10  # steps
LONG_WINDOW = 30  # steps
FALLEN_SHARE = 0.1
KL_NATS = 50.0
CHANCE_BAND = 0.05
MOVED_SHARE = 0.5
REPETITION_SHARE = 0.5
EMPTY_SHARE = 0.1


def both_falling(history: Sequence[Line]) -> str:
    """The chosen completions have lost more than a tenth of their log-prob, and the rejected fell too."""
    steps = _steps(history)
    chosen, rejected, logps = (
        _recent_mean(steps, name, WINDOW)
        for name in ("logratios/chosen", "logratios/rejected", "logps/chosen")
    )
    if chosen is None or rejected is None or logps is None:
        return ""
    reference = logps - chosen
    if chosen >= FALLEN_SHARE * reference or rejected >= 0:
        return ""
    return (
        f"both log-ratios are falling: chosen {chosen:.3g}, rejected {rejected:.3g} nats over the last {WINDOW} steps; the "
        f"chosen completions fell from {reference:.3g} to {logps:.3g} nats. Lower the learning rate, raise beta, or add "
        f"loss.sft_weight"
    )


def kl_exploding(history: Sequence[Line]) -> str:
    """KTO's reference point is far from zero."""
    kl = _recent_mean(_steps(history), "kl", WINDOW)
    if kl is None or kl <= KL_NATS:
        return ""
    return (
        f"kl is {kl:.3g} nats over the last {WINDOW} steps (healthy: below {KL_NATS:g}): the policy has left the reference. "
        f"Lower the learning rate or raise beta"
    )


def accuracy_at_chance(history: Sequence[Line]) -> str:
    """Accuracy stays at one half."""
    accuracy = _recent_mean(_steps(history), "rewards/accuracies", LONG_WINDOW)
    if accuracy is None or abs(accuracy - 0.5) > CHANCE_BAND:
        return ""
    return (
        f"rewards/accuracies is {accuracy:.3f} over the last {LONG_WINDOW} steps: nothing is learned yet. "
        f"Look at the data (are chosen and rejected swapped or alike?) and raise the learning rate"
    )


def no_gradient(history: Sequence[Line]) -> str:
    """The newest step had a gradient of exactly zero."""
    steps = _steps(history)
    if not steps or steps[-1].get("grad_norm") != 0:
        return ""
    return f"grad_norm is 0 at step {steps[-1]['step']}: no pair of this step is still learned from"


def weights_stand_still(history: Sequence[Line]) -> str:
    """Most weights keep their value in a step whose learning rate is not zero."""
    moving = [line for line in _steps(history) if line.get("learning_rate")]
    share = _recent_mean(moving, "weights_changed", WINDOW)
    if share is None or share >= MOVED_SHARE:
        return ""
    return (
        f"an optimizer step changes only {share:.0%} of the weights (last {WINDOW} steps): the learning rate is "
        f"too small for their precision, or most of them get no gradient"
    )


def steps_skipped(history: Sequence[Line]) -> str:
    """Steps without a finite loss or gradient were left out."""
    steps = _steps(history)
    skipped = sum(bool(line.get("skipped")) for line in steps)
    if not skipped:
        return ""
    return f"{skipped} of the last {len(steps)} steps were skipped: their loss or gradient was not finite"


def samples_degenerate(history: Sequence[Line]) -> str:
    """Sampled completions repeat themselves, are empty, or come from scores that are not finite."""
    sampled = [line for line in history if "samples/mean_tokens" in line][-1:]
    if not sampled:
        return ""
    line = sampled[0]
    problems = []
    if line["samples/nonfinite_share"] > 0:
        problems.append(f"{line['samples/nonfinite_share']:.0%} from scores that are NaN or infinite")
    if line["samples/empty_share"] > EMPTY_SHARE:
        problems.append(f"{line['samples/empty_share']:.0%} empty")
    if line["samples/repetition_share"] > REPETITION_SHARE:
        problems.append(f"{line['samples/repetition_share']:.0%} of their 4-grams repeated")
    if not problems:
        return ""
    return (
        f"samples at step {line['step']} degenerate: {', '.join(problems)} "
        f"(mean length {line['samples/mean_tokens']:.1f} tokens)"
    )


CHECKS: tuple[Callable[[Sequence[Line]], str], ...] = (
    both_falling,
    kl_exploding,
    accuracy_at_chance,
    no_gradient,
    weights_stand_still,
    steps_skipped,
    samples_degenerate,
)


class Watch:
    """Says each warning when a run enters it, and again only after it had left it."""

    def __init__(self) -> None:
        """Start with nothing said."""
        self._warned: set[str] = set()

    def new_warnings(self, history: Sequence[Line]) -> Iterator[str]:
        """One line for each check that the newest line made fail."""
        for check in CHECKS:
            problem = check(history)
            if problem and check.__name__ not in self._warned:
                yield f"Warning: {problem}."
            (self._warned.add if problem else self._warned.discard)(check.__name__)


def _steps(history: Sequence[Line]) -> list[Line]:
    """The lines of optimizer steps, without the evaluation before the first."""
    return [line for line in history[-2 * LONG_WINDOW :] if line["step"] > 0]


def _recent_mean(lines: Sequence[Line], name: str, window: int) -> float | None:
    """Mean of a metric over the newest lines that have it; None when none does, or while there are fewer lines."""
    values = [line[name] for line in lines[-window:] if line.get(name) is not None]
    return fmean(values) if values and len(lines) >= window else None
