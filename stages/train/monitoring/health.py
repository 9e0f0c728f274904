"""Warnings when a metric leaves its healthy range: pure functions of the lines logged so far.

In: the lines of `metrics.jsonl` so far.  Out: warnings of one sentence. No check stops a run. docs/metrics.md has the
same ranges as a table.
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
CHANGED_SHARE = 0.5
REPETITION_SHARE = 0.5
EMPTY_SHARE = 0.1


def both_falling(history: Sequence[Line]) -> str:
    """The log-prob of the chosen completions fell by more than a tenth, and that of the rejected ones fell too."""
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
        f"log-prob of the chosen completions fell from {reference:.3g} to {logps:.3g} nats. Lower the learning rate, raise "
        f"beta, or set loss.sft_weight"
    )


def kl_exploding(history: Sequence[Line]) -> str:
    """KTO's reference point is far above zero."""
    kl = _recent_mean(_steps(history), "kl", WINDOW)
    if kl is None or kl <= KL_NATS:
        return ""
    return (
        f"kl is {kl:.3g} nats over the last {WINDOW} steps (healthy: below {KL_NATS:g}): the policy is far from the "
        f"reference. Lower the learning rate or raise beta"
    )


def accuracy_at_chance(history: Sequence[Line]) -> str:
    """The accuracy stays at one half."""
    accuracy = _recent_mean(_steps(history), "rewards/accuracies", LONG_WINDOW)
    if accuracy is None or abs(accuracy - 0.5) > CHANCE_BAND:
        return ""
    return (
        f"rewards/accuracies is {accuracy:.3f} over the last {LONG_WINDOW} steps: nothing is learned yet. Check the data "
        f"(chosen and rejected may be swapped or too similar) and raise the learning rate"
    )


def no_gradient(history: Sequence[Line]) -> str:
    """The newest step had a gradient of exactly zero."""
    steps = _steps(history)
    if not steps or steps[-1].get("grad_norm") != 0:
        return ""
    return f"grad_norm is 0 at step {steps[-1]['step']}: no example of this step has a gradient"


def weights_unchanged(history: Sequence[Line]) -> str:
    """Most weights keep their value in a step whose learning rate is not 0."""
    updates = [line for line in _steps(history) if line.get("learning_rate")]
    share = _recent_mean(updates, "weights_changed", WINDOW)
    if share is None or share >= CHANGED_SHARE:
        return ""
    return (
        f"an optimizer step changes only {share:.0%} of the weights that have a gradient (last {WINDOW} steps): the "
        f"learning rate is too small for the precision of the weights"
    )


def steps_skipped(history: Sequence[Line]) -> str:
    """Steps were skipped because their loss or gradient was not finite."""
    steps = _steps(history)
    skipped = sum(bool(line.get("skipped")) for line in steps)
    if not skipped:
        return ""
    return f"{skipped} of the last {len(steps)} steps were skipped: their loss or gradient was not finite"


def samples_degenerate(history: Sequence[Line]) -> str:
    """Sampled completions repeat themselves, are empty, or come from logits that are not finite."""
    sampled = [line for line in history if "samples/mean_tokens" in line][-1:]
    if not sampled:
        return ""
    line = sampled[0]
    problems = []
    if line["samples/nonfinite_share"] > 0:
        problems.append(f"{line['samples/nonfinite_share']:.0%} from logits that are NaN or infinite")
    if line["samples/empty_share"] > EMPTY_SHARE:
        problems.append(f"{line['samples/empty_share']:.0%} empty")
    if line["samples/repetition_share"] > REPETITION_SHARE:
        problems.append(f"{line['samples/repetition_share']:.0%} of the 4-grams repeated")
    if not problems:
        return ""
    return (
        f"samples at step {line['step']} are degenerate: {', '.join(problems)} "
        f"(mean length {line['samples/mean_tokens']:.1f} tokens)"
    )


CHECKS: tuple[Callable[[Sequence[Line]], str], ...] = (
    both_falling,
    kl_exploding,
    accuracy_at_chance,
    no_gradient,
    weights_unchanged,
    steps_skipped,
    samples_degenerate,
)


class Watch:
    """Yields each warning once when its check begins to fail, and again only after the check has passed in between."""

    def __init__(self) -> None:
        """Begin without warnings."""
        self._warned: set[str] = set()

    def new_warnings(self, history: Sequence[Line]) -> Iterator[str]:
        """One line for each check that fails with the newest line and did not fail before."""
        for check in CHECKS:
            problem = check(history)
            if problem and check.__name__ not in self._warned:
                yield f"Warning: {problem}."
            (self._warned.add if problem else self._warned.discard)(check.__name__)


def _steps(history: Sequence[Line]) -> list[Line]:
    """The newest lines, without the evaluation at step 0."""
    return [line for line in history[-2 * LONG_WINDOW :] if line["step"] > 0]


def _recent_mean(lines: Sequence[Line], name: str, window: int) -> float | None:
    """Mean of a metric over the last `window` lines, those without it left out; None if all are, or with fewer lines."""
    values = [line[name] for line in lines[-window:] if line.get(name) is not None]
    return fmean(values) if values and len(lines) >= window else None
