"""Layouts with one response a row, gathered by prompt into ranked lists; and rows that are tokens already."""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, ClassVar

from stages.data.columns import entries, finite_number, shown, text
from stages.data.messages import completion_of, prompt_of
from stages.data.source_row import BadRow
from stages.formats.contract import Candidate, Format, Preference, Tokens, Unusable, ranked, weight_of


class ScoredRows(Format):
    """One response a row: `prompt`, `text` or `response` or `completion`, `reward` or `score`."""

    name: ClassVar[str] = "scored_rows"
    columns: ClassVar[str] = "prompt, text or response or completion, reward or score; one response a row"
    ranked: ClassVar[bool] = True
    gathered_by: ClassVar[str | None] = "prompt"
    responses: ClassVar[tuple[str, ...]] = ("text", "response", "completion")
    scores: ClassVar[tuple[str, ...]] = ("reward", "score")

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return (
            "prompt" in row
            and len(set(cls.responses) & row.keys()) == 1
            and len(set(cls.scores) & row.keys()) == 1
            and not {"label", "chosen", "type"} & row.keys()
        )

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        members = members_of(row)
        columns = [
            next((name for name in names if name in members[0]), names[0])
            for names in (cls.responses, cls.scores)
        ]
        completions = [completion_of(member, columns[0]) for member in members]
        scores = [finite_number(member.get(columns[1]), columns[1]) for member in members]
        return ranked(members[0], prompt_of(members[0]), completions, scores)


class Prometheus(Format):
    """Prometheus' evaluations: question and response stand in a rubric prompt; the mean of `gpt4_score` ranks.

    A row is one model's response; the rows of one question make a list.
    """

    name: ClassVar[str] = "prometheus"
    columns: ClassVar[str] = "instruction (rubric prompt), gpt4_score (a list of scores); one response a row"
    ranked: ClassVar[bool] = True
    gathered_by: ClassVar[str | None] = "idx"
    parts: ClassVar[re.Pattern[str]] = re.compile(
        r"###The instruction to evaluate:\n(.*)\n\n###Response to evaluate:\n(.*)\n\n###Reference Answer",
        re.DOTALL,
    )

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {"idx", "instruction", "gpt4_score"} <= row.keys()

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        members = members_of(row)
        found = [cls.parts.search(text(member, "instruction")) for member in members]
        if None in found:
            raise BadRow("instruction: expected ###The instruction to evaluate and ###Response to evaluate")
        questions, responses = zip(*(part.groups() for part in found if part), strict=True)
        if len(set(questions)) > 1:
            raise BadRow("instruction: rows of one idx ask different questions")
        scores = [
            fmean([finite_number(score, "gpt4_score") for score in entries(member, "gpt4_score")] or [0.0])
            for member in members
        ]
        return ranked(row, [{"role": "user", "content": questions[0]}], list(responses), scores)


class TokenizedPair(Format):
    """TRL's tokenized rows: `prompt_ids`, `chosen_ids`, `rejected_ids` (or `*_input_ids`), used as they are."""

    name: ClassVar[str] = "tokenized"
    holds_ids: ClassVar[bool] = True
    columns: ClassVar[str] = "prompt_ids, chosen_ids, rejected_ids (or *_input_ids; optional *_mask)"
    sides: ClassVar[tuple[str, ...]] = ("chosen", "rejected")

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return all(_ids_column(row, name) for name in ("prompt", *cls.sides))

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        prompt, chosen, rejected = (_tokens(row, name) for name in ("prompt", *cls.sides))
        if chosen.ids == rejected.ids:
            raise Unusable("identical_completions")
        weight = weight_of(row)
        sides = [
            Candidate(side, role, None, weight) for side, role in ((chosen, "chosen"), (rejected, "rejected"))
        ]
        return Preference(prompt, sides)


class TokenizedUnpaired(Format):
    """Tokenized rows of single completions: `prompt_ids`, `completion_ids`, `label`."""

    name: ClassVar[str] = "tokenized_unpaired"
    holds_ids: ClassVar[bool] = True
    columns: ClassVar[str] = "prompt_ids, completion_ids (optional completion_mask), label (true or false)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return all(_ids_column(row, name) for name in ("prompt", "completion")) and "label" in row

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        from stages.data.columns import truth

        role = "desirable" if truth(row, "label") else "undesirable"
        return Preference(
            _tokens(row, "prompt"), [Candidate(_tokens(row, "completion"), role, None, weight_of(row))]
        )


def members_of(row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The rows that `gather` (`group_by_prompt.py`) put together; a row that was not gathered is alone."""
    return row["rows"] if "rows" in row and isinstance(row["rows"], list) else [row]


def _ids_column(row: Mapping[str, Any], name: str) -> str | None:
    columns = (f"{name}_ids", f"{name}_input_ids")
    return next((column for column in columns if isinstance(row.get(column), list)), None)


def _tokens(row: Mapping[str, Any], name: str) -> Tokens:
    column = _ids_column(row, name) or f"{name}_ids"
    ids = entries(row, column)
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise BadRow(f"{column}: expected token ids, found {shown(ids)}")
    mask = row.get(f"{name}_mask")
    if mask is None or name == "prompt":
        return Tokens(tuple(ids))
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(flag in (0, 1) for flag in mask):
        raise BadRow(f"{name}_mask: expected one 0 or 1 for each of the {len(ids)} ids, found {shown(mask)}")
    return Tokens(tuple(ids), tuple(bool(flag) for flag in mask))
