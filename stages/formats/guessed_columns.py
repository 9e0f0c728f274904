"""A column map for rows that no format matches, guessed from the names of their columns.

It is proposed and never used unasked: `align prepare` prints it in its error, `align init` writes it into a
configuration and shows the rows that it gives.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

PROMPT = frozenset(("prompt", "question", "instruction", "query", "request", "message", "user", "input"))
COMPLETION = frozenset(
    ("completion", "answer", "response", "output", "reply", "generation", "assistant", "bot", "text")
)
CHOSEN = frozenset(("chosen", "preferred", "better", "best", "good", "accepted", "winner", "winning", "win"))
REJECTED = frozenset(("rejected", "dispreferred", "worse", "worst", "bad", "loser", "losing", "lose"))
LABEL = frozenset(
    ("label", "thumb", "thumbs", "feedback", "vote", "like", "liked", "desirable", "good", "helpful")
)
VERDICT = frozenset(("verdict", "winner", "preference", "preferred", "choice", "label", "vote", "better"))
SCORE = frozenset(("score", "reward", "rating", "grade", "stars"))
TEXTS = ("prompt", "a", "b", "chosen", "rejected", "completion", "response")
SCORES = ("score_a", "score_b")
# A map that does not name them leaves them out.
KEPT = ("system", "tools", "weight")
SIDES = (("a", "b"), ("1", "2"), ("0", "1"))

Layout = tuple[tuple[str, frozenset[str]], ...]
# The columns of a format, and words of which its name has one.
SCORED: tuple[Layout, ...] = ((("prompt", PROMPT),),)
COMPARED: tuple[Layout, ...] = ((("verdict", VERDICT), ("prompt", PROMPT)),)
OTHERS: tuple[Layout, ...] = (
    (("chosen", CHOSEN), ("rejected", REJECTED), ("prompt", PROMPT)),
    (("label", LABEL), ("completion", COMPLETION), ("prompt", PROMPT)),
    (("reward", SCORE), ("response", COMPLETION), ("prompt", PROMPT)),
)


def guessed_columns(row: Mapping[str, Any]) -> dict[str, str]:
    """`data.columns` for the layout that the columns' names suggest; empty where they suggest none."""
    words = {str(name): _words(str(name)) for name in row}
    answers = next(_two(("a", "b"), COMPLETION, words), {})
    scores = next(_two(SCORES, SCORE, words), {}) if answers else {}
    for layout in SCORED if scores else COMPARED if answers else OTHERS:
        found = _matched(row, words, layout, answers | scores)
        if found:
            ordered = {name: found[name] for name in TEXTS if name in found}
            return ordered | found | {name: name for name in KEPT if name in row}
    return {}


def as_yaml(columns: Mapping[str, str]) -> str:
    """A column map on one line, for `data.columns`."""
    pairs = (
        f"{name}: {column if column.isidentifier() else json.dumps(column)}"
        for name, column in columns.items()
    )
    return f"{{{', '.join(pairs)}}}"


def _matched(
    row: Mapping[str, Any], words: Mapping[str, frozenset[str]], layout: Layout, answers: Mapping[str, str]
) -> dict[str, str]:
    found = dict(answers)
    for column, wanted in layout:
        named = [name for name in words if words[name] & wanted and name not in found.values()]
        # Of answer and answer_length, the first.
        whole = [name for name in named if words[name] <= wanted] or named
        if len(whole) != 1 or not _fits(column, row[whole[0]]):
            return {}
        found[column] = whole[0]
    return found


def _fits(column: str, value: Any) -> bool:
    nested = isinstance(value, list | Mapping)
    return nested or isinstance(value, str) if column in TEXTS else not nested


def _two(
    columns: tuple[str, str], kind: frozenset[str], words: Mapping[str, frozenset[str]]
) -> Iterator[dict[str, str]]:
    """Columns of a kind whose names differ in one word alone: a and b, 1 and 2, or 0 and 1."""
    for first, own in words.items():
        for one, other in SIDES:
            second = [name for name in words if words[name] == own - {one} | {other}]
            if one in own and own & kind and len(second) == 1:
                yield dict(zip(columns, (first, second[0]), strict=True))


def _words(name: str) -> frozenset[str]:
    """The words of a name, in lower case: `modelAnswer_1` has model, answer and 1."""
    return frozenset(re.findall(r"[^\W\d_]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).casefold()))
