"""Layouts of preference data: the only list of formats, and how the format of a source is chosen.

A format is one small class (its members: `contract.py`) in the file of its family. The choice is made from the
first rows: where not exactly one format matches them, the user has to choose.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cache.errors import DataError
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
    StepDPO,
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
from stages.formats.trees import OpenAssistant, spread
from stages.formats.trl import (
    Explicit,
    Graded,
    Implicit,
    ImplicitText,
    Posts,
    Transcript,
    UltraFeedback,
    Unpaired,
)
from stages.formats.two_answers import (
    AlpacaEval,
    ArenaLists,
    Bedrock,
    HelpSteer2,
    HelpSteer3,
    JudgeBench,
    LLMBar,
    MultiPref,
    TwoAnswers,
    Vertex,
    WebGPT,
)
from stages.formats.unknown_layout import names_of, unknown_layout

FAMILIES: dict[str, tuple[type[Format], ...]] = {
    "Pairs": (
        Explicit,
        UltraFeedback,
        Implicit,
        ImplicitText,
        Transcript,
        StepDPO,
        Orca,
        NamedResponses,
        StackExchange,
        AlpacaRanking,
        ShareGPTRanking,
        V1Messages,
        AxolotlChat,
        OpenAI,
        Swift,
    ),
    "Two responses and a verdict": (
        TwoAnswers,
        HalosPairwise,
        Arena,
        SHP,
        SafeRLHFBetter,
        SafeRLHFSafer,
        PandaLM,
        HelpSteer2,
        HelpSteer3,
        LLMBar,
        JudgeBench,
        MultiPref,
        AlpacaEval,
        WebGPT,
        ArenaLists,
        Vertex,
        Bedrock,
    ),
    "Single responses, good or bad": (
        Unpaired,
        TaggedMessages,
        TaggedAlpaca,
        AxolotlKTO,
        HalosBinary,
        HelpSteer,
    ),
    "Many responses, graded or ranked": (
        Graded,
        Posts,
        ScoredRows,
        Prometheus,
        RankedAnswers,
        NeMo,
        OpenAssistant,
        Nectar,
        OnPolicyScores,
    ),
    "Token ids": (
        TokenizedPair,
        TokenizedUnpaired,
    ),
}
FORMATS = tuple(format_ for family in FAMILIES.values() for format_ in family)
# Rows looked at before a format is chosen.
DETECTION_ROWS = 1000

__all__ = [
    "DETECTION_ROWS",
    "FAMILIES",
    "FORMATS",
    "Candidate",
    "Format",
    "Preference",
    "Tokens",
    "Unusable",
    "arranged",
    "choose_format",
    "conversion",
    "detect_format",
    "renamed",
]


def arranged(rows: Iterable[SourceRow], format_: type[Format]) -> Iterator[SourceRow]:
    """The rows of a source as its format converts them: those of one prompt gathered, trees spread, most as they are."""
    if format_.gathered_by:
        return gather(rows, format_.gathered_by)
    return spread(rows) if format_.has_trees else iter(rows)


def detect_format(name: str, rows: Sequence[SourceRow]) -> type[Format]:
    """The format called `name`, or with 'auto' the only one that matches any of these rows.

    Raises `DataError` where several match, naming them, or none does.
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
    """The format called `name`, or with 'auto' the only one that matches the row `first`."""
    known = {entry.name: entry for entry in FORMATS}
    if name != "auto":
        if name not in known:
            raise DataError(f"Unknown data.format {name!r}. Known formats: {', '.join(known)}.")
        return known[name]
    if found is None:
        found = Counter(entry for entry in FORMATS if entry.matches(first))
        if len(found) == 1:
            return next(iter(found))
    columns = names_of(first)
    if not found:
        raise DataError(f"{where}: a row with columns {columns} {unknown_layout(first, FORMATS)}")
    counts = "" if num_rows == 1 else f" of the first {num_rows:,} rows"
    layouts = "; ".join(
        f"{entry.name}{f', {count:,}{counts}' if counts else ''}: {entry.columns}"
        for entry, count in found.items()
    )
    raise DataError(
        f"{where}: a row with columns {columns} fits several formats. Choose with --set data.format=NAME from {layouts}."
    )
