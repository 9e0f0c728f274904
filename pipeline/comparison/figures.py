"""The figures of a comparison as labels and short texts, for the terminal and for the page.

In: the figures of one model.  Out: lines in the order in which they are shown; a model without a figure has no such line.
"""

from pipeline.tables import percent
from stages.compare.comparison import Against
from stages.compare.text_figures import TextFigures

Lines = dict[str, str]


def win_lines(against: Against) -> Lines:
    """How a model does against the baseline."""
    lines: Lines = {}
    rate, position, controlled = against.rate, against.position, against.length_controlled
    if rate:
        lines["win-rate"] = f"{percent(rate.rate)} ({percent(rate.low)} to {percent(rate.high)})"
        total = rate.wins + rate.ties + rate.losses
        lines["wins / ties / losses"] = f"{rate.wins:,} / {rate.ties:,} / {rate.losses:,}"
        lines["ties"] = percent(rate.ties / total)
    missing = sum(outcome.preference is None for outcome in against.outcomes)
    if missing:
        lines["pairs without a verdict"] = f"{missing:,}"
    lines["length-controlled"] = "none" if controlled.rate is None else percent(controlled.rate)
    if position:
        first = "no win" if position.first_wins is None else f"{percent(position.first_wins)} of wins"
        lines["shown first"] = first
        lines["orders disagree"] = f"{position.disagreements:,} of {position.pairs:,}"
    if against.mean_score is not None and against.mean_baseline_score is not None:
        lines["mean score"] = f"{against.mean_score:.4g} (baseline {against.mean_baseline_score:.4g})"
    return lines


def notes(against: Against) -> list[str]:
    """What the figures do not say: why one is missing."""
    found = []
    if against.length_controlled.problem:
        found.append(f"no length-controlled win-rate: {against.length_controlled.problem}")
    problem = next(filter(None, (outcome.problem for outcome in against.outcomes)), None)
    if problem:
        found.append(f"the first pair without a verdict: {problem}")
    return found


def text_lines(texts: TextFigures) -> Lines:
    """What the completions of a model look like."""
    lines = {"completions": f"{texts.completions:,}"}
    if texts.mean_tokens is not None and texts.median_tokens is not None:
        lines["tokens, mean / median"] = f"{texts.mean_tokens:,.1f} / {texts.median_tokens:,g}"
    lines["characters, mean / median"] = f"{texts.mean_characters:,.1f} / {texts.median_characters:,g}"
    if texts.unfinished is not None:
        lines["unfinished"] = percent(texts.unfinished)
    lines["distinct-1 / distinct-2"] = f"{texts.distinct_1:.3f} / {texts.distinct_2:.3f}"
    lines["repetition (4 words)"] = percent(texts.repetition)
    lines["refusals (by phrases)"] = percent(texts.refusals)
    return lines
