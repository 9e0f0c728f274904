"""Layouts of preference data: the only list of formats, and how one is chosen for a source.

A format is one small class (`contract.py` says what it has) in the file of its family. Choosing looks at
the first rows: exactly one format must know them, or the choice is left to a person.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cache.errors import DataError
from stages.data.messages import PROMPT_COLUMNS
from stages.data.source_row import SourceRow
from stages.formats.column_map import renamed
from stages.formats.contract import Candidate, Format, Preference, Tokens, Unusable
from stages.formats.datasets import (
    SHP,
    Arena,
    HelpSteer,
    Nectar,
    OnPolicyScores,
    PandaLM,
    SafeRLHFBetter,
    SafeRLHFSafer,
    StackExchange,
)
from stages.formats.frameworks import (
    AxolotlChat,
    AxolotlKTO,
    HalosBinary,
    HalosPairwise,
    NamedResponses,
    NeMo,
    OpenAI,
    Orca,
    Swift,
)
from stages.formats.group_by_prompt import gather
from stages.formats.llama_factory import (
    AlpacaRanking,
    RankedAnswers,
    ShareGPTRanking,
    TaggedAlpaca,
    TaggedMessages,
    V1Messages,
)
from stages.formats.one_response_per_row import Prometheus, ScoredRows, TokenizedPair, TokenizedUnpaired
from stages.formats.ties_and_rankings import conversion
from stages.formats.trl import Explicit, Graded, Implicit, Posts, Transcript, UltraFeedback, Unpaired

FORMATS: tuple[type[Format], ...] = (
    # pairs
    Explicit,
    UltraFeedback,
    Implicit,
    Transcript,
    Orca,
    NamedResponses,
    StackExchange,
    AlpacaRanking,
    ShareGPTRanking,
    V1Messages,
    AxolotlChat,
    OpenAI,
    Swift,
    # two responses and a verdict
    HalosPairwise,
    Arena,
    SHP,
    SafeRLHFBetter,
    SafeRLHFSafer,
    PandaLM,
    # single responses, good or bad
    Unpaired,
    TaggedMessages,
    TaggedAlpaca,
    AxolotlKTO,
    HalosBinary,
    HelpSteer,
    # many responses, graded or ranked
    Graded,
    Posts,
    ScoredRows,
    Prometheus,
    RankedAnswers,
    NeMo,
    Nectar,
    OnPolicyScores,
    # token ids
    TokenizedPair,
    TokenizedUnpaired,
)
# Rows looked at before a format is chosen.
DETECTION_ROWS = 1000

__all__ = [
    "DETECTION_ROWS",
    "FORMATS",
    "Candidate",
    "Format",
    "Preference",
    "Tokens",
    "Unusable",
    "choose_format",
    "conversion",
    "detect_format",
    "gather",
    "renamed",
]


def detect_format(name: str, rows: Sequence[SourceRow]) -> type[Format]:
    """The format called `name`, or with 'auto' the only one that knows any of these rows.

    Raises `DataError` with the candidates where several do, or where none does.
    """
    if name != "auto":
        return choose_format(name, {}, "")
    found: Counter[type[Format]] = Counter()
    readable = [row for row in rows[:DETECTION_ROWS] if row.value is not None]
    for row in readable:
        found.update(entry for entry in FORMATS if entry.matches(row.value or {}))
    if len(found) == 1:
        return next(iter(found))
    return choose_format(name, readable[0].value or {}, readable[0].location, found, len(readable))


def choose_format(
    name: str,
    first: Mapping[str, Any],
    where: str,
    found: Counter[type[Format]] | None = None,
    num_rows: int = 1,
) -> type[Format]:
    """The format called `name`, or with 'auto' the only one whose layout `first` has."""
    known = {entry.name: entry for entry in FORMATS}
    if name != "auto":
        if name not in known:
            raise DataError(f"Unknown data.format {name!r}. Known formats: {', '.join(known)}.")
        return known[name]
    if found is None:
        found = Counter(entry for entry in FORMATS if entry.matches(first))
        if len(found) == 1:
            return next(iter(found))
    columns = ", ".join(sorted(map(str, first)))
    if not found:
        raise DataError(f"{where}: a row with columns {columns} {_unknown(first)}")
    counts = "" if num_rows == 1 else f" of the first {num_rows:,} rows"
    layouts = "; ".join(
        f"{entry.name}{f', {count:,}{counts}' if counts else ''}: {entry.columns}"
        for entry, count in found.items()
    )
    raise DataError(
        f"{where}: a row with columns {columns} fits several formats. Choose with --set data.format=NAME from {layouts}."
    )


def _unknown(first: Mapping[str, Any]) -> str:
    """What to do about rows that no format knows."""
    if any(column in first for column in PROMPT_COLUMNS) and not _has_answer(first):
        return (
            "holds a prompt and no answers. Prompts serve align sample: --set sample.prompts=FILE. "
            "If there are answers, say in YAML which columns are which (data.columns), or choose with --set data.format=NAME; docs/formats.md shows a row of each."
        )
    names = ", ".join(entry.name for entry in FORMATS)
    return (
        "fits no known format. Say in YAML which columns are which, for example data.columns: "
        f"{{prompt: question, chosen: good, rejected: bad}}, or choose with --set data.format=NAME from {names}; docs/formats.md shows a row of each."
    )


def _has_answer(first: Mapping[str, Any]) -> bool:
    words = ("chosen", "rejected", "response", "completion", "output", "answer", "text", "label")
    return any(word in str(column) for column in first for word in words)
