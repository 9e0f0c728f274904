"""The interface of a format: a source row in, a `Preference` out.

A format is chosen once for a whole source, from its first rows. Conversion raises `BadRow` for a malformed row
(`data.on_bad_row`: stop or skip) and `Unusable` for a well-formed row without a preference (always dropped, and counted by
reason). A format reads from the row alone which completion is better; ties, ranked lists and thresholds are treated in one
place, `ties_and_rankings.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from stages.data.columns import finite_number, is_absent, optional_text, shown
from stages.data.messages import Message, as_messages, template_kwargs_of, tools_of, without_weight
from stages.data.source_row import BadRow
from stages.data.transcript import transcript_prompt
from stages.settings.data import Meaning

SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
    ("chosen_score", "rejected_score"),
)
KEYS_OF_SCORES = frozenset(column for columns in SCORE_COLUMNS for column in columns) | {"margin"}


class Unusable(Exception):
    """A well-formed row that is not used; the argument is the reason it is counted under."""


@dataclass(frozen=True)
class Tokens:
    """Token ids that the row brings; `mask` (of a completion) is true where a token is trained, None for all."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class Candidate:
    """One completion: plain text, messages (assistant turns, possibly others between them), or token ids.

    `role` is chosen, rejected, desirable, undesirable or ranked, or 'scored' for a single response that
    `data.threshold` makes desirable or undesirable. Where `ends_turn` is false, it is one step of an answer, and gets no
    end token.
    """

    completion: str | list[Message] | Tokens
    role: str
    score: float | None = None
    weight: float = 1.0
    ends_turn: bool = True


@dataclass(frozen=True)
class Preference:
    """A prompt (plain text, messages or token ids), its candidates, the tools that the prompt offers, and template arguments.

    `tied`: the two candidates were judged equal, so their roles chosen and rejected mean nothing.
    """

    prompt: str | list[Message] | Tokens
    candidates: list[Candidate]
    tools: list[Any] | None = None
    tied: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None


class Format:
    """A layout of source rows. Subclasses are listed in `stages.formats.FORMATS`, the only list."""

    name: ClassVar[str]
    # Whose layout it is, with † where it was built from the published schema and tried on no file of theirs.
    origin: ClassVar[str]
    # A row as JSON, for documents and tests: in each, 4 is the right answer to 2+2.
    example: ClassVar[str]
    # The columns it reads, for messages and documents.
    columns: ClassVar[str]
    # Rows are ranked lists: prepare.graded keeps the best and the worst, or all.
    ranked: ClassVar[bool] = False
    # Rows are single responses; those with the same values in these columns are gathered first.
    gathered_by: ClassVar[tuple[str, ...]] = ()
    # A row is a tree of messages, which becomes a row for every message with ranked replies.
    has_trees: ClassVar[bool] = False
    # Columns whose values mean good or bad, or which of two answers; `data.labels` maps them.
    label_columns: ClassVar[tuple[str, ...]] = ()
    # What they may mean.
    meanings: ClassVar[tuple[Meaning, ...]] = (True, False)
    # Rows are token ids, so their prompts cannot be compared with those of text.
    holds_ids: ClassVar[bool] = False
    # Rows are single scored responses, desirable from the score data.threshold on.
    needs_threshold: ClassVar[bool] = False

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        """Whether a row has this layout."""
        raise NotImplementedError

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        """The preference of a row. Raises `BadRow` or `Unusable`."""
        raise NotImplementedError


def pair(
    row: Mapping[str, Any],
    prompt: str | list[Message],
    chosen: str | list[Message],
    rejected: str | list[Message],
    *,
    scores: tuple[float | None, float | None] | None = None,
    tied: bool = False,
    tools: list[Any] | None = None,
) -> Preference:
    """A chosen and a rejected completion of one prompt, with the row's scores, weight, system text and tools.

    Tied also where the column `status` says so. Raises `Unusable` when there is nothing to prefer.
    """
    if chosen == rejected:
        raise Unusable("identical_completions")
    best, worst = scores_of(row) if scores is None else scores
    sides = [(chosen, "chosen", best), (rejected, "rejected", worst)]
    return assembled(row, prompt, sides, tied or row.get("status") == "tie", tools=tools)


def ranked(
    row: Mapping[str, Any],
    prompt: str | list[Message],
    completions: Sequence[str | list[Message]],
    scores: Sequence[float],
    weights: Sequence[float] | None = None,
) -> Preference:
    """A ranked list of completions with their scores; tied where all scores are equal.

    `weights` are those of the completions; without them, each has the row's.
    """
    if len(completions) < 2:
        raise Unusable("fewer_than_two_responses")
    sides = [(completion, "ranked", score) for completion, score in zip(completions, scores, strict=True)]
    return assembled(row, prompt, sides, min(scores) == max(scores), weights)


def assembled(
    row: Mapping[str, Any],
    prompt: str | list[Message],
    sides: Sequence[tuple[str | list[Message], str, float | None]],
    tied: bool = False,
    weights: Sequence[float] | None = None,
    tools: list[Any] | None = None,
) -> Preference:
    """A preference of (completion, role, score), all text or all messages, with the row's weight, system text and tools.

    A text prompt that is a transcript becomes its turns.
    """
    system = optional_text(row, "system") or optional_text(row, "system_prompt")
    tools = tools_of(row) if tools is None else tools
    arguments = template_kwargs_of(row)
    turns = transcript_prompt(prompt) if isinstance(prompt, str) else None
    if turns:
        prompt = turns
        if turns[-1]["role"] != "assistant":  # a completion that continues a turn keeps its white space
            sides = [
                (side.strip() if isinstance(side, str) else side, role, score) for side, role, score in sides
            ]
    all_text = all(isinstance(value, str) for value in (prompt, *(side[0] for side in sides)))
    if tools or system or arguments or not all_text:
        prompt = as_messages(prompt, "user")
        sides = [(as_messages(completion, "assistant"), role, score) for completion, role, score in sides]
    if system and isinstance(prompt, list) and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    weights = [weight_of(row)] * len(sides) if weights is None else weights
    if isinstance(prompt, list):
        prompt = [without_weight(message) for message in prompt]
    candidates = [
        Candidate(completion, role, score, weight * turn_weight(completion))
        for (completion, role, score), weight in zip(sides, weights, strict=True)
    ]
    return Preference(prompt, candidates, tools, tied, arguments)


def scores_of(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The scores of the chosen and the rejected completion, None where the row has no such columns.

    A `margin` alone becomes the score of the chosen completion, and the rejected one has score 0.
    """
    if not KEYS_OF_SCORES & row.keys():
        return None, None
    for columns in SCORE_COLUMNS:
        values = [row.get(column) for column in columns]
        if not any(map(is_absent, values)):
            chosen, rejected = (
                finite_number(value, column) for column, value in zip(columns, values, strict=True)
            )
            return chosen, rejected
    if not is_absent(row.get("margin")):
        return finite_number(row["margin"], "margin"), 0.0
    return None, None


def weight_of(row: Mapping[str, Any]) -> float:
    """The `weight` column of a row, 1 where there is none."""
    if is_absent(row.get("weight")):
        return 1.0
    weight = finite_number(row["weight"], "weight")
    if weight < 0:
        raise BadRow(f"weight: expected a weight of at least 0, found {shown(weight)}")
    if weight == 0:
        raise Unusable("weight_zero")
    return weight


def turn_weight(completion: str | list[Message]) -> float:
    """The common loss weight of the trained turns of a completion; raises `BadRow` when they differ."""
    if isinstance(completion, str):
        return 1.0
    weights = {message.get("weight", 1.0) for message in completion if message["role"] == "assistant"} - {0.0}
    if len(weights) > 1:
        raise BadRow(
            f"loss_weight: the turns of one completion have weights {', '.join(map(str, sorted(weights)))}; expected 0 or one weight"
        )
    return weights.pop() if weights else 1.0
