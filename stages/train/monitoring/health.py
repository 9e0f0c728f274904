"""Warnings when a metric leaves its healthy range: pure functions of the lines logged so far.

In: the lines of `metrics.jsonl` so far.  Out: warnings of one sentence. No check stops a run. docs/metrics.md has the
same ranges as a table, and where they come from.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from stages.losses.contract import Loss

Line = Mapping[str, Any]
WINDOW = 10  # steps
LONG_WINDOW = 30  # steps
FALLEN_SHARE = 0.1
# Of 20 trainings on graded stories, those whose chosen log-prob fell by up to 0.53 of itself had the best samples; all
# that were worse than the untrained model had fallen by 1.08 or more (docs/metrics.md).
FALLEN_FAR_SHARE = 0.75
NLL_RISE = 0.02
MARGIN = 10.0  # sigmoid(-10) = 5e-5: a pair has hardly any gradient left
RISEN_NATS, RISEN_SHARE = 50.0, 0.2
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


def chosen_fallen(history: Sequence[Line]) -> str:
    """The log-prob of the chosen completions has fallen far, whatever the loss: of the held-out ones, else in training."""
    before, after, where = _change(history, "logps/chosen")
    if before is None or after is None or after >= (1 + FALLEN_FAR_SHARE) * before:
        return ""
    return (
        f"the log-prob of the chosen completions{where} fell from {before:.3g} to {after:.3g} nats, by more than "
        f"{FALLEN_FAR_SHARE:.0%} of it: the policy unlearns the preferred answers, however good loss and margin are. "
        f"Lower the learning rate, train fewer steps, or add an SFT term"
    )


def nll_rising(history: Sequence[Line]) -> str:
    """The negative log-prob of the held-out chosen completions, which the loss lowers in training, has risen."""
    names = [name for name in (_steps(history) or [{}])[-1] if name == "nll" or name.endswith("/nll")]
    for name in (name for name in names if not name.startswith("eval/")):
        values = [line[f"eval/{name}"] for line in history if line.get(f"eval/{name}") is not None]
        if values and values[-1] > (1 + NLL_RISE) * min(values):
            return (
                f"eval/{name} rose to {values[-1]:.4g}, from {min(values):.4g} at its best: the policy memorizes the training "
                f"completions. Train fewer steps, lower the learning rate, or set train.save_best=true with "
                f"train.best_metric={name}"
            )
    return ""


def margin_beyond(history: Sequence[Line]) -> str:
    """The margin of the training pairs is larger than a logistic loss can use."""
    margin = _recent_mean(_steps(history), "rewards/margins", WINDOW)
    if margin is None or margin <= MARGIN:
        return ""
    return (
        f"rewards/margins is {margin:.3g} over the last {WINDOW} steps (useful: below {MARGIN:g}): the pairs are memorized "
        f"and have no gradient left. Train fewer steps, or lower the learning rate"
    )


def logratios_beyond(history: Sequence[Line]) -> str:
    """The log-prob of a side is far from the reference's: the chosen has risen far, or the rejected has doubled."""
    steps = _steps(history)
    found = {}
    for side in ("chosen", "rejected"):
        ratio, logps = (_recent_mean(steps, f"{name}/{side}", WINDOW) for name in ("logratios", "logps"))
        if ratio is not None and logps is not None:
            found[side] = ratio, logps - ratio
    ratio, reference = found.get("chosen", (0.0, 0.0))
    if ratio > RISEN_NATS and ratio > -RISEN_SHARE * reference:
        return _far("chosen", ratio, reference, "the completions are memorized")
    ratio, reference = found.get("rejected", (0.0, 0.0))
    if ratio < min(reference, 0.0):
        return _far("rejected", ratio, reference, "their log-prob has more than doubled")
    return ""


def _far(side: str, ratio: float, reference: float, what: str) -> str:
    return (
        f"logratios/{side} is {ratio:+.3g} nats over the last {WINDOW} steps, and the reference has {reference:.3g}: {what}. "
        f"Lower the learning rate, train fewer steps, or raise beta"
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
    what = f"an optimizer step changes only {share:.0%} of the weights that have a gradient (last {WINDOW} steps): "
    coarse = _recent_mean(updates, "weights_too_coarse", WINDOW) or 0.0
    if coarse >= (1 - share) / 2:
        return f"{what}the learning rate is too small for the precision of the weights"
    norm = _recent_mean(updates, "grad_norm", WINDOW)
    return (
        f"{what}the learning rate would suffice for their precision, but their gradients are close to 0 "
        f"(grad_norm {'unknown' if norm is None else format(norm, '.3g')}), as when every pair is learned"
    )


def weights_nonfinite(history: Sequence[Line]) -> str:
    """Some weights are infinite or NaN."""
    share = (_steps(history) or [{}])[-1].get("weights_nonfinite")
    if not share:
        return ""
    return (
        f"{share:.2%} of the weights are infinite or NaN: they cannot be trained. If those of the starting model are finite, "
        f"lower the learning rate and begin anew"
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


Check = Callable[[Sequence[Line]], str]
CHECKS: tuple[Check, ...] = (
    both_falling,
    chosen_fallen,
    nll_rising,
    margin_beyond,
    logratios_beyond,
    kl_exploding,
    accuracy_at_chance,
    no_gradient,
    weights_unchanged,
    weights_nonfinite,
    steps_skipped,
    samples_degenerate,
)


def checks_of(loss: Loss) -> list[Check]:
    """The checks that apply to a loss."""
    # Rewards are sums over a completion. Where the loss divides them by the length, no margin is too large.
    divides = getattr(loss, "divides_by_length", False) or getattr(loss, "normalize", "sum") == "mean"
    return [check for check in CHECKS if not (divides and check is margin_beyond)]


def warnings_now(history: Sequence[Line], loss: Loss) -> list[str]:
    """The warnings of all checks that fail with the newest line."""
    return [problem for check in checks_of(loss) if (problem := check(history))]


class Watch:
    """Yields each warning once when its check begins to fail, and again only after the check has passed in between."""

    def __init__(self, loss: Loss) -> None:
        """Begin without warnings."""
        self._checks = checks_of(loss)
        self._warned: set[str] = set()
        # What checks read of the lines before the newest: the first ones and the evaluations. A check at every step that
        # read all lines would take longer from step to step.
        self._early: list[Line] = []
        self._num_seen = 0

    def new_warnings(self, history: Sequence[Line]) -> Iterator[str]:
        """One line for each check that fails with the newest line and did not fail before."""
        newest = history[-2 * LONG_WINDOW :]
        for line in history[self._num_seen : len(history) - len(newest)]:
            if line["step"] <= WINDOW or any(name.startswith("eval/") for name in line):
                self._early.append(line)
        self._num_seen = len(history) - len(newest)
        for check in self._checks:
            problem = check([*self._early, *newest])
            if problem and check.__name__ not in self._warned:
                yield f"Warning: {problem}."
            (self._warned.add if problem else self._warned.discard)(check.__name__)


def _steps(history: Sequence[Line]) -> list[Line]:
    """The newest lines, without the evaluation at step 0."""
    return [line for line in history[-2 * LONG_WINDOW :] if line["step"] > 0]


def _change(history: Sequence[Line], name: str) -> tuple[float | None, float | None, str]:
    """A metric before training and now: of the held-out rows, else means over the first and the last steps."""
    held_out = [line[f"eval/{name}"] for line in history if line.get(f"eval/{name}") is not None]
    if held_out:
        return held_out[0], held_out[-1], " held out"
    steps = [line for line in history if line["step"] > 0]
    return _recent_mean(steps[:WINDOW], name, WINDOW), _recent_mean(steps, name, WINDOW), ""


def _recent_mean(lines: Sequence[Line], name: str, window: int) -> float | None:
    """Mean of a metric over the last `window` lines, those without it left out; None if all are, or with fewer lines."""
    values = [line[name] for line in lines[-window:] if line.get(name) is not None]
    return fmean(values) if values and len(lines) >= window else None
