"""Layouts of preference data: one small class each, turning a source row into a `Preference`.

A format is chosen once for a whole source, from its columns and confirmed on its rows. Conversion
raises `BadRow` for a row that is malformed (stop or skip, as `data.on_bad_row` says) and `Unusable`
for a well-formed row that carries no preference (always dropped, counted by reason).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from cache.errors import DataError
from stages.columns import (
    Message,
    as_messages,
    check_completion,
    completion_of,
    finite_number,
    messages,
    prompt_of,
    role_of,
    shown,
    text,
)
from stages.pairs import best_and_worst
from stages.reading import BadRow

SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_score", "rejected_score"),
)


class Unusable(Exception):
    """A well-formed row without a usable preference; the argument is the reason it is counted under."""


@dataclass(frozen=True)
class Candidate:
    """One completion: plain text or messages (assistant turns, possibly others between them)."""

    completion: str | list[Message]
    role: str
    score: float | None = None


@dataclass(frozen=True)
class Preference:
    """A prompt (plain text or messages) and its candidates."""

    prompt: str | list[Message]
    candidates: list[Candidate]


class Explicit:
    """`prompt`, `chosen`, `rejected`: each text or messages, the completions without the prompt."""

    name: ClassVar[str] = "preference"
    columns: ClassVar[str] = "prompt, chosen, rejected (text or message lists)"

    @staticmethod
    def matches(row: Mapping[str, Any]) -> bool:
        """Whether a row has this layout."""
        return {"prompt", "chosen", "rejected"} <= row.keys() and not _repeats_prompt(row)

    @staticmethod
    def convert(row: Mapping[str, Any]) -> Preference:
        """The preference of a row."""
        prompt = prompt_of(row)
        chosen, rejected = completion_of(row, "chosen"), completion_of(row, "rejected")
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise BadRow("chosen and rejected: one is text and the other is messages")
        if isinstance(prompt, str) != isinstance(chosen, str):
            prompt, chosen, rejected = (
                as_messages(prompt, "user"),
                as_messages(chosen, "assistant"),
                as_messages(rejected, "assistant"),
            )
        return pair(prompt, chosen, rejected, *scores(row))


class UltraFeedback:
    """`prompt` text, `chosen` and `rejected` whole conversations that repeat it, optional scores."""

    name: ClassVar[str] = "ultrafeedback"
    columns: ClassVar[str] = "prompt (text), chosen, rejected (whole conversations)"

    @staticmethod
    def matches(row: Mapping[str, Any]) -> bool:
        """Whether a row has this layout."""
        return {"prompt", "chosen", "rejected"} <= row.keys() and _repeats_prompt(row)

    @staticmethod
    def convert(row: Mapping[str, Any]) -> Preference:
        """The preference of a row."""
        preference = Implicit.convert(row)
        users = [
            message["content"]
            for message in preference.prompt
            if isinstance(message, dict) and message["role"] == "user"
        ]
        prompt = prompt_of(row)
        if isinstance(prompt, str) and prompt.strip() not in [content.strip() for content in users]:
            raise BadRow("prompt: the conversations in chosen and rejected do not contain it")
        return preference


class Implicit:
    """`chosen` and `rejected` whole conversations; the prompt is the messages they begin with in common."""

    name: ClassVar[str] = "implicit"
    columns: ClassVar[str] = "chosen, rejected (whole conversations as message lists)"

    @staticmethod
    def matches(row: Mapping[str, Any]) -> bool:
        """Whether a row has this layout."""
        return (
            {"chosen", "rejected"} <= row.keys() and "prompt" not in row and isinstance(row["chosen"], list)
        )

    @staticmethod
    def convert(row: Mapping[str, Any]) -> Preference:
        """The preference of a row."""
        prompt, chosen, rejected = split_shared(messages(row, "chosen"), messages(row, "rejected"))
        check_completion(chosen, "chosen")
        check_completion(rejected, "rejected")
        return pair(prompt, chosen, rejected, *scores(row))


class Transcript:
    r"""hh-rlhf: `chosen` and `rejected` transcripts of `\n\nHuman: ...` and `\n\nAssistant: ...` turns."""

    name: ClassVar[str] = "hh"
    columns: ClassVar[str] = r"chosen, rejected (\n\nHuman: / \n\nAssistant: transcripts)"
    turn: ClassVar[re.Pattern[str]] = re.compile(r"\n\n(Human|Assistant):")

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        """Whether a row has this layout."""
        return {"chosen", "rejected"} <= row.keys() and "prompt" not in row and isinstance(row["chosen"], str)

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        """The preference of a row."""
        chosen, rejected = (cls.parse(text(row, column), column) for column in ("chosen", "rejected"))
        if chosen[:-1] != rejected[:-1]:
            raise Unusable("prompts_differ")
        return pair(chosen[:-1], chosen[-1:], rejected[-1:], *scores(row))

    @classmethod
    def parse(cls, transcript: str, column: str) -> list[Message]:
        """Messages of a transcript, which must begin with Human and end with Assistant."""
        head, *pieces = cls.turn.split(transcript)
        roles, contents = pieces[::2], pieces[1::2]
        if head.strip() or not roles or roles[0] != "Human" or roles[-1] != "Assistant":
            raise BadRow(
                f"{column}: expected a transcript from '\\n\\nHuman:' to '\\n\\nAssistant:', found {shown(transcript)}"
            )
        names = {"Human": "user", "Assistant": "assistant"}
        return [
            {"role": names[role], "content": content.strip()}
            for role, content in zip(roles, contents, strict=True)
        ]


class Unpaired:
    """`prompt`, `completion`, `label`: single completions marked desirable (true) or not (false)."""

    name: ClassVar[str] = "unpaired"
    columns: ClassVar[str] = "prompt, completion, label (true or false)"

    @staticmethod
    def matches(row: Mapping[str, Any]) -> bool:
        """Whether a row has this layout."""
        return {"prompt", "completion", "label"} <= row.keys()

    @staticmethod
    def convert(row: Mapping[str, Any]) -> Preference:
        """The preference of a row."""
        label = row.get("label")
        if not isinstance(label, bool) and label not in (0, 1):
            raise BadRow(f"label: expected true or false, found {shown(label)}")
        prompt, completion = prompt_of(row), completion_of(row, "completion")
        if isinstance(prompt, str) != isinstance(completion, str):
            prompt, completion = as_messages(prompt, "user"), as_messages(completion, "assistant")
        return Preference(prompt, [Candidate(completion, "desirable" if label else "undesirable")])


class Graded:
    """`prompt`, `responses`, `rewards`: scored completions; a pair of the best and the worst, or all."""

    name: ClassVar[str] = "graded"
    columns: ClassVar[str] = "prompt, responses, rewards (lists of equal length)"

    @staticmethod
    def matches(row: Mapping[str, Any]) -> bool:
        """Whether a row has this layout."""
        return {"prompt", "responses", "rewards"} <= row.keys()

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        """The best response against the worst."""
        ranked = cls.rank(row)
        best, worst = (ranked.candidates[place] for place in best_and_worst(row["rewards"]))
        return pair(ranked.prompt, best.completion, worst.completion, best.score, worst.score)

    @staticmethod
    def rank(row: Mapping[str, Any]) -> Preference:
        """All responses, ranked by their scores."""
        responses, rewards = row.get("responses"), row.get("rewards")
        if not isinstance(responses, list) or not isinstance(rewards, list) or len(responses) != len(rewards):
            raise BadRow("responses and rewards: expected lists of equal length")
        rewards = [finite_number(reward, "rewards") for reward in rewards]
        if len(responses) < 2:
            raise Unusable("fewer_than_two_responses")
        if min(rewards) == max(rewards):
            raise Unusable("tie")
        best, worst = best_and_worst(rewards)
        if responses[best] == responses[worst]:
            raise Unusable("identical_completions")
        prompt = prompt_of(row)
        completions = [text({"responses": response}, "responses") for response in responses]
        if not isinstance(prompt, str):
            completions = [as_messages(completion, "assistant") for completion in completions]
        return Preference(
            prompt,
            [
                Candidate(completion, "ranked", reward)
                for completion, reward in zip(completions, rewards, strict=True)
            ],
        )


FORMATS = (Explicit, UltraFeedback, Implicit, Transcript, Unpaired, Graded)
Format = (
    type[Explicit] | type[UltraFeedback] | type[Implicit] | type[Transcript] | type[Unpaired] | type[Graded]
)


def choose_format(name: str, first: Mapping[str, Any], where: str) -> Format:
    """The format called `name`, or with 'auto' the only one whose layout `first` has."""
    known = {entry.name: entry for entry in FORMATS}
    if name != "auto":
        if name not in known:
            raise DataError(f"Unknown data.format {name!r}. Known formats: {', '.join(known)}.")
        return known[name]
    found = [entry for entry in FORMATS if entry.matches(first)]
    if len(found) == 1:
        return found[0]
    layouts = "; ".join(f"{entry.name}: {entry.columns}" for entry in found or FORMATS)
    what = "fits several formats" if found else "fits no known format"
    raise DataError(
        f"{where}: a row with columns {', '.join(sorted(first))} {what}. Choose with --set data.format=NAME from {layouts}."
    )


def pair(
    prompt: Any, chosen: Any, rejected: Any, score_chosen: float | None, score_rejected: float | None
) -> Preference:
    """A chosen and a rejected completion of one prompt; raises `Unusable` when there is nothing to prefer."""
    if chosen == rejected:
        raise Unusable("identical_completions")
    return Preference(
        prompt, [Candidate(chosen, "chosen", score_chosen), Candidate(rejected, "rejected", score_rejected)]
    )


def split_shared(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The messages two conversations share, up to a user or tool turn, and what follows in each."""
    if chosen == rejected:
        raise Unusable("identical_completions")
    shorter = min(len(chosen), len(rejected))
    shared = next((index for index in range(shorter) if chosen[index] != rejected[index]), shorter)
    while shared and (shared == shorter or chosen[shared - 1]["role"] == "assistant"):
        shared -= 1
    rest = chosen[shared:], rejected[shared:]
    if not shared or any(not side or side[0]["role"] != "assistant" for side in rest):
        raise Unusable("prompts_differ")
    return chosen[:shared], *rest


def scores(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The scores of the chosen and the rejected completion, where the row has such columns."""
    for columns in SCORE_COLUMNS:
        values = [row.get(column) for column in columns]
        if all(value is not None for value in values):
            chosen, rejected = (
                finite_number(value, column) for column, value in zip(columns, values, strict=True)
            )
            return chosen, rejected
    return None, None


def _repeats_prompt(row: Mapping[str, Any]) -> bool:
    sides = row["chosen"], row["rejected"]
    return all(
        isinstance(side, list) and side and isinstance(side[0], Mapping) and role_of(side[0]) != "assistant"
        for side in sides
    )
