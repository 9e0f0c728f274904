"""How ties, ranked lists and scored responses become preferences, by the settings, the same for every format.

- A tie is dropped and counted. With `data.ties=half` it becomes two pairs, each completion chosen once, with half the
  weight: for a pairwise loss, a label of one half.
- A ranked list becomes a pair of its best and its worst, or with `prepare.graded=ranked` stays whole.
- A single scored response is desirable from `data.threshold` on.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from cache.errors import UsageError
from stages.data.pairs import best_and_worst
from stages.data.source_row import SourceRow
from stages.formats.contract import Candidate, Format, Preference, Unusable
from stages.formats.labels import labelled_row, labels_of
from stages.settings.data import DataSettings, PrepareSettings


def conversion(
    format_: type[Format], data: DataSettings, settings: PrepareSettings, head: Iterable[SourceRow] = ()
) -> Callable[[Mapping[str, Any]], Preference]:
    """The function from a source row to its preference; `head` has the first rows, which show how labels are written.

    Raises `UsageError` where a setting does not fit the format, and `DataError` for labels that need a setting.
    """
    labels, _ = labels_of(format_, head, data)
    if settings.graded == "ranked" and not format_.ranked:
        raise UsageError(
            f"prepare.graded=ranked is for graded or ranked responses, but {data.path} has format {format_.name} ({format_.columns}). Leave it out."
        )
    if format_.needs_threshold and data.threshold is None:
        raise UsageError(
            f"{data.path} has format {format_.name}: single responses with scores. Set the score from which on a response is desirable with --set data.threshold=SCORE, or compare the responses of one prompt by mapping columns to prompt, response and score (data.columns)."
        )
    if data.threshold is not None and not format_.needs_threshold and not (labels and not data.labels):
        raise UsageError(
            f"data.threshold is for single scored responses, but {data.path} has format {format_.name}. Leave it out."
        )

    def convert(row: Mapping[str, Any]) -> Preference:
        preference = format_.convert(labelled_row(row, format_, labels) if labels else row)
        if format_.needs_threshold and data.threshold is not None:
            return _labelled(preference, data.threshold)
        if preference.tied and (data.ties == "drop" or settings.graded == "ranked"):
            raise Unusable("tie")
        if format_.ranked:
            best, worst = _ends(preference)
            if best.completion == worst.completion:
                raise Unusable("identical_completions")
            if settings.graded == "ranked":
                return preference
            ends = [replace(best, role="chosen"), replace(worst, role="rejected")]
            preference = replace(preference, candidates=ends)
        return _both_ways(preference) if preference.tied else preference

    return convert


def _ends(preference: Preference) -> tuple[Candidate, Candidate]:
    """The best and the worst of a ranked list; the first and the last where all scores are equal."""
    candidates = preference.candidates
    if preference.tied:
        return candidates[0], candidates[-1]
    best, worst = best_and_worst([candidate.score or 0.0 for candidate in candidates])
    return candidates[best], candidates[worst]


def _both_ways(preference: Preference) -> Preference:
    """A tie as two pairs of one example: each candidate is once chosen and once rejected."""
    first, second = (replace(candidate, weight=candidate.weight / 2) for candidate in preference.candidates)
    candidates = [
        replace(first, role="chosen"),
        replace(second, role="rejected"),
        replace(second, role="chosen"),
        replace(first, role="rejected"),
    ]
    return replace(preference, candidates=candidates)


def _labelled(preference: Preference, threshold: float) -> Preference:
    candidates = [
        replace(candidate, role="desirable" if (candidate.score or 0.0) >= threshold else "undesirable")
        for candidate in preference.candidates
    ]
    return replace(preference, candidates=candidates)
