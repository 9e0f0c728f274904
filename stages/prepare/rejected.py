"""rejected.jsonl: the rows that could not be used, with their locations, problems and reasons."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from cache.artifacts import Draft
from cache.errors import DataError
from stages.prepare.examples import BAD_ROW, Outcome, RejectedRow
from stages.settings.data import DataSettings

NAME = "rejected.jsonl"
SHOWN_PROBLEMS = 3


def without_malformed(outcome: Outcome, data: DataSettings) -> Outcome:
    """The outcome; raises `DataError` for its first malformed row, unless such rows are skipped."""
    malformed = [row for row in outcome.rejected if row.reason == BAD_ROW]
    if malformed and data.on_bad_row == "error":
        raise DataError(
            f"{malformed[0].location}: {malformed[0].problem}. Fix the row, or skip such rows with --set data.on_bad_row=skip."
        )
    return outcome


def list_rejected(rejected: Sequence[RejectedRow], draft: Draft) -> None:
    """List a batch's rejected rows."""
    if not rejected:
        return
    with open(draft.path / NAME, "a", encoding="ascii") as handle:
        for row in rejected:
            handle.write(json.dumps({"location": row.location, "problem": row.problem, "reason": row.reason}))
            handle.write("\n")


def listed(draft: Draft) -> Iterator[dict[str, Any]]:
    """The rejected rows that have been listed."""
    path = draft.path / NAME
    if path.exists():
        with open(path, encoding="ascii") as lines:
            yield from map(json.loads, lines)


def kept_problems(draft: Draft) -> str:
    """The commonest problems with a row each, for an error message; the list is kept beside the place of the artifact."""
    counts: Counter[str] = Counter()
    first: dict[str, dict[str, Any]] = {}
    for row in listed(draft):
        kind = row["problem"].split(", found")[0]
        counts[kind] += 1
        first.setdefault(kind, row)
    if not counts:
        return ""
    path = draft.final.with_name(f"{draft.final.name}.{NAME}")
    shutil.copyfile(draft.path / NAME, path)
    parts = [
        f"{count:,} as {first[kind]['location']}: {first[kind]['problem']}"
        for kind, count in counts.most_common(SHOWN_PROBLEMS)
    ]
    return f" The commonest problems: {'; '.join(parts)}. All are listed in {path}."
