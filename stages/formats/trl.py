"""TRL's layouts, and those of the data sets that TRL's users start from.

Explicit, implicit and unpaired, standard and conversational; UltraFeedback binarized (also argilla's and
OpenRLHF's); hh-rlhf's transcripts; and the project's own graded rows.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from stages.data.columns import finite_number, shown, text, truth
from stages.data.messages import (
    Message,
    check_completion,
    completion_of,
    is_conversation,
    messages,
    prompt_of,
    role_of,
    text_or_messages,
    without_weight,
)
from stages.data.source_row import BadRow
from stages.formats.contract import Format, Preference, Unusable, assembled, pair, ranked


class Explicit(Format):
    """`prompt`, `chosen`, `rejected`: each text or messages, the completions without the prompt."""

    name: ClassVar[str] = "preference"
    columns: ClassVar[str] = "prompt, chosen, rejected (text or message lists)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {"prompt", "chosen", "rejected"} <= row.keys() and not _repeats_prompt(row)

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        chosen, rejected = completion_of(row, "chosen"), completion_of(row, "rejected")
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise BadRow("chosen and rejected: one is text and the other is messages")
        return pair(row, prompt_of(row), chosen, rejected)


class UltraFeedback(Format):
    """`prompt` text, `chosen` and `rejected` whole conversations that repeat it, optional scores."""

    name: ClassVar[str] = "ultrafeedback"
    columns: ClassVar[str] = "prompt (text), chosen, rejected (whole conversations)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {"prompt", "chosen", "rejected"} <= row.keys() and _repeats_prompt(row)

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        preference = Implicit.convert(row)
        turns = preference.prompt if isinstance(preference.prompt, list) else []
        users = [message["content"].strip() for message in turns if message["role"] == "user"]
        prompt = text_or_messages(row, "prompt")
        if isinstance(prompt, str) and prompt.strip() not in users:
            raise BadRow("prompt: the conversations in chosen and rejected do not contain it")
        return preference


class Implicit(Format):
    """`chosen` and `rejected` whole conversations; the prompt is the messages they begin with in common."""

    name: ClassVar[str] = "implicit"
    columns: ClassVar[str] = "chosen, rejected (whole conversations as message lists)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return (
            {"chosen", "rejected"} <= row.keys()
            and not {"prompt", "messages", "conversations"} & row.keys()
            and isinstance(row["chosen"], list)
        )

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        return shared_prompt(row, "chosen", "rejected")


class Transcript(Format):
    r"""hh-rlhf: `chosen` and `rejected` transcripts of `\n\nHuman: ...` and `\n\nAssistant: ...` turns."""

    name: ClassVar[str] = "hh"
    columns: ClassVar[str] = r"chosen, rejected (\n\nHuman: / \n\nAssistant: transcripts)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        others = {"prompt", "question", "input", "instruction", "messages", "conversations"}
        return (
            {"chosen", "rejected"} <= row.keys()
            and not others & row.keys()
            and isinstance(row["chosen"], str)
        )

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        chosen, rejected = (transcript(text(row, column), column) for column in ("chosen", "rejected"))
        for column, turns in (("chosen", chosen), ("rejected", rejected)):
            if turns[-1]["role"] != "assistant":
                raise BadRow(f"{column}: {_expected(str(row[column]))}")
        if chosen[:-1] != rejected[:-1]:
            raise Unusable("prompts_differ")
        return pair(row, chosen[:-1], chosen[-1:], rejected[-1:])


class Unpaired(Format):
    """`prompt`, `completion`, `label`: single completions marked desirable (true) or not (false)."""

    name: ClassVar[str] = "unpaired"
    columns: ClassVar[str] = "prompt, completion, label (true or false)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {"prompt", "completion", "label"} <= row.keys()

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        return labelled(row, prompt_of(row), completion_of(row, "completion"), "label")


class Graded(Format):
    """`prompt`, `responses`, `rewards`: scored completions of one prompt."""

    name: ClassVar[str] = "graded"
    columns: ClassVar[str] = "prompt, responses, rewards (lists of equal length)"
    ranked: ClassVar[bool] = True
    prompt: ClassVar[str] = "prompt"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {cls.prompt, "responses", "rewards"} <= row.keys()

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        return listed(row, prompt_of(row, cls.prompt), "responses", "rewards")


class Posts(Graded):
    """ODPO's file: one JSON object, from each post to its `responses` and `rewards`."""

    name: ClassVar[str] = "odpo"
    columns: ClassVar[str] = "one JSON object: {post: {responses, rewards}}"
    prompt: ClassVar[str] = "key"


def listed(row: Mapping[str, Any], prompt: str | list[Message], responses: str, rewards: str) -> Preference:
    """A ranked list from a column of texts and one of numbers."""
    texts, numbers = row.get(responses), row.get(rewards)
    if not isinstance(texts, list) or not isinstance(numbers, list) or len(texts) != len(numbers):
        raise BadRow(f"{responses} and {rewards}: expected lists of equal length")
    scores = [finite_number(number, rewards) for number in numbers]
    completions = [completion_of({responses: value}, responses) for value in texts]
    return ranked(row, prompt, completions, scores)


def labelled(
    row: Mapping[str, Any], prompt: str | list[Message], completion: str | list[Message], column: str
) -> Preference:
    """One completion, desirable where the column is true."""
    side = "desirable" if truth(row, column) else "undesirable"
    return assembled(row, prompt, [(completion, side, None)])


def shared_prompt(row: Mapping[str, Any], chosen: str, rejected: str) -> Preference:
    """A pair of two columns that hold whole conversations."""
    prompt, better, worse = split_shared(messages(row, chosen), messages(row, rejected))
    check_completion(better, chosen)
    check_completion(worse, rejected)
    return pair(row, prompt, better, worse)


def split_shared(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The messages two conversations share, up to a user or tool turn, and what follows in each."""
    said, other = ([without_weight(message) for message in side] for side in (chosen, rejected))
    if said == other:
        raise Unusable("identical_completions")
    shorter = min(len(said), len(other))
    shared = next((index for index in range(shorter) if said[index] != other[index]), shorter)
    while shared and (shared == shorter or said[shared - 1]["role"] == "assistant"):
        shared -= 1
    rest = chosen[shared:], rejected[shared:]
    if not shared or any(not side or side[0]["role"] != "assistant" for side in rest):
        raise Unusable("prompts_differ")
    return said[:shared], *rest


def last_answer(turns: list[Message], column: str) -> tuple[list[Message], list[Message]]:
    """A conversation cut behind its last user turn: the prompt, and all that answers it, tool results too."""
    users = [place for place, message in enumerate(turns) if message["role"] == "user"]
    cut = users[-1] + 1 if users else sum(message["role"] == "system" for message in turns[:1])
    if not 0 < cut < len(turns):
        raise BadRow(f"{column}: expected a question and an assistant turn that answers it")
    check_completion(turns[cut:], column)
    return turns[:cut], turns[cut:]


_TURN = re.compile(r"\n\n(Human|Assistant):")


def transcript(value: str, column: str) -> list[Message]:
    r"""Messages of a transcript that begins with `\n\nHuman:`; an empty last Assistant turn is kept."""
    head, *pieces = _TURN.split(value)
    roles, contents = pieces[::2], pieces[1::2]
    if head.strip() or not roles or roles[0] != "Human":
        raise BadRow(f"{column}: {_expected(value)}")
    names = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": names[role], "content": content.strip()}
        for role, content in zip(roles, contents, strict=True)
    ]


def _expected(value: str) -> str:
    return f"expected a transcript from '\\n\\nHuman:' to '\\n\\nAssistant:', found {shown(value)}"


def _repeats_prompt(row: Mapping[str, Any]) -> bool:
    sides = row["chosen"], row["rejected"]
    return all(is_conversation(side) and role_of(side[0]) != "assistant" for side in sides)


def is_text(row: Mapping[str, Any], *columns: str) -> bool:
    """Whether all these columns hold text."""
    return all(isinstance(row.get(column), str) for column in columns)
