"""Layouts with one response per row, gathered by prompt into ranked lists; and layouts of token ids."""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, ClassVar

from stages.data.columns import entries, finite_number, shown, text, truth
from stages.data.messages import completion_of, prompt_of
from stages.data.source_row import BadRow
from stages.formats.contract import Candidate, Format, Preference, Tokens, Unusable, ranked, weight_of


class ScoredRows(Format):
    """One response per row: `prompt`, `text` or `response` or `completion`, `reward` or `score`."""

    name: ClassVar[str] = "scored_rows"
    origin: ClassVar[str] = "one response per row"
    example: ClassVar[str] = r'{"prompt": "2+2?", "response": "4", "reward": 1.5}'
    columns: ClassVar[str] = "prompt, text or response or completion, reward or score; one response per row"
    ranked: ClassVar[bool] = True
    # All that makes the prompt.
    gathered_by: ClassVar[tuple[str, ...]] = (
        "prompt",
        "system",
        "system_prompt",
        "tools",
        "chat_template_kwargs",
    )
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
        weights = [weight_of(member) for member in members]
        return ranked(members[0], prompt_of(members[0]), completions, scores, weights)


class Prometheus(Format):
    """Prometheus' evaluations: question and response are inside a rubric prompt; ranked by the mean of `gpt4_score`.

    A row is one model's response; the rows of one question form a ranked list.
    """

    name: ClassVar[str] = "prometheus"
    origin: ClassVar[str] = "Prometheus' evaluations"
    example: ClassVar[str] = (
        r'{"idx": 1, "instruction": "###The instruction to evaluate:\n2+2?\n\n###Response to evaluate:\n4\n\n###Reference Answer (Score 5):\n4", "gpt4_score": [5, 5, 4]}'
    )
    columns: ClassVar[str] = (
        "instruction (rubric prompt), gpt4_score (a list of scores); one response per row"
    )
    ranked: ClassVar[bool] = True
    gathered_by: ClassVar[tuple[str, ...]] = ("idx",)
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
    """TRL's tokenized rows: `prompt_ids`, `chosen_ids`, `rejected_ids` (or `*_input_ids`)."""

    name: ClassVar[str] = "tokenized"
    origin: ClassVar[str] = "TRL, tokenized"
    example: ClassVar[str] = r'{"prompt_ids": [5, 6, 7], "chosen_ids": [8, 2], "rejected_ids": [9, 2]}'
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
    label_columns: ClassVar[tuple[str, ...]] = ("label",)
    origin: ClassVar[str] = "tokenized"
    example: ClassVar[str] = (
        r'{"prompt_ids": [5, 6, 7], "completion_ids": [8, 2], "completion_mask": [1, 1], "label": false}'
    )
    holds_ids: ClassVar[bool] = True
    columns: ClassVar[str] = "prompt_ids, completion_ids (optional completion_mask), label (true or false)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return all(_ids_column(row, name) for name in ("prompt", "completion")) and "label" in row

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        role = "desirable" if truth(row, "label") else "undesirable"
        return Preference(
            _tokens(row, "prompt"), [Candidate(_tokens(row, "completion"), role, None, weight_of(row))]
        )


def members_of(row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The rows that `gather` (`group_by_prompt.py`) put together; a row that was not gathered is the only one."""
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
