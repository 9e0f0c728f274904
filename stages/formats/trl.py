"""TRL's layouts, and those of the data sets that its users often start from.

Explicit, implicit and unpaired prompts, standard and conversational; UltraFeedback binarized (also argilla's and
OpenRLHF's); hh-rlhf's transcripts; and rows of graded responses.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from stages.data.columns import entries, finite_number, text, truth
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
from stages.data.transcript import expected_transcript, transcript
from stages.formats.contract import Format, Preference, Unusable, assembled, pair, ranked

# Columns that hold a prompt in some layout.
PROMPTS = frozenset({"prompt", "question", "input", "instruction", "messages", "conversations"})


class Explicit(Format):
    """`prompt`, `chosen`, `rejected`: each text or messages, the completions without the prompt."""

    name: ClassVar[str] = "preference"
    origin: ClassVar[str] = "TRL; OpenRLHF"
    example: ClassVar[str] = r'{"prompt": "2+2?", "chosen": "4", "rejected": "5"}'
    columns: ClassVar[str] = "prompt, chosen, rejected (text or message lists)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return (
            {"prompt", "chosen", "rejected"} <= row.keys()
            and "initial_reason_steps" not in row
            and not _repeats_prompt(row)
        )

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        chosen, rejected = completion_of(row, "chosen"), completion_of(row, "rejected")
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise BadRow("chosen and rejected: one is text and the other is messages")
        return pair(row, prompt_of(row), chosen, rejected)


class UltraFeedback(Format):
    """`prompt` text, `chosen` and `rejected` whole conversations that repeat it, optional scores."""

    name: ClassVar[str] = "ultrafeedback"
    origin: ClassVar[str] = "HuggingFaceH4 and argilla"
    example: ClassVar[str] = (
        r'{"prompt": "2+2?", "chosen": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], "rejected": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}], "score_chosen": 9.0, "score_rejected": 2.0}'
    )
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
    """`chosen` and `rejected` whole conversations; the prompt is their common beginning."""

    name: ClassVar[str] = "implicit"
    origin: ClassVar[str] = "TRL"
    example: ClassVar[str] = (
        r'{"chosen": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], "rejected": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}]}'
    )
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
    origin: ClassVar[str] = "Anthropic"
    example: ClassVar[str] = (
        r'{"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"}'
    )
    columns: ClassVar[str] = r"chosen, rejected (\n\nHuman: / \n\nAssistant: transcripts)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return (
            is_text(row, "chosen", "rejected")
            and not PROMPTS & row.keys()
            and any(row[side].lstrip().startswith("Human:") for side in ("chosen", "rejected"))
        )

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        chosen, rejected = (transcript(text(row, column), column) for column in ("chosen", "rejected"))
        for column, turns in (("chosen", chosen), ("rejected", rejected)):
            if turns[-1]["role"] != "assistant":
                raise BadRow(f"{column}: {expected_transcript(str(row[column]))}")
        if chosen[:-1] != rejected[:-1]:
            raise Unusable("prompts_differ")
        return pair(row, chosen[:-1], chosen[-1:], rejected[-1:])


class ImplicitText(Format):
    """`chosen` and `rejected` texts; the prompt is their common beginning, as TRL's `extract_prompt` finds it.

    It is the layout only where no other column could be the prompt.
    """

    name: ClassVar[str] = "implicit_text"
    origin: ClassVar[str] = "TRL"
    example: ClassVar[str] = r'{"chosen": "2+2=4", "rejected": "2+2=5"}'
    columns: ClassVar[str] = "chosen, rejected (texts that begin with the prompt)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        sides = ("chosen", "rejected")
        return (
            is_text(row, *sides)
            and not any(row[side].lstrip().startswith("Human:") for side in sides)
            and not any(_could_be_prompt(column, row[column]) for column in row.keys() - set(sides))
            and bool(_common_beginning(row["chosen"], row["rejected"]).strip())
        )

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        chosen, rejected = text(row, "chosen"), text(row, "rejected")
        prompt = _common_beginning(chosen, rejected)
        if chosen == rejected:
            raise Unusable("identical_completions")
        if not prompt.strip():
            raise BadRow(
                "chosen and rejected: the texts have no common beginning, which would be their prompt; where a column has the prompt, map it in YAML (data.columns)"
            )
        return pair(row, prompt, chosen[len(prompt) :], rejected[len(prompt) :])


class Unpaired(Format):
    """`prompt`, `completion`, `label`: single completions, desirable (true) or undesirable (false)."""

    name: ClassVar[str] = "unpaired"
    label_columns: ClassVar[tuple[str, ...]] = ("label",)
    origin: ClassVar[str] = "TRL"
    example: ClassVar[str] = r'{"prompt": "2+2?", "completion": "4", "label": true}'
    columns: ClassVar[str] = "prompt, completion, label (true or false)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {"prompt", "completion", "label"} <= row.keys()

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        return labelled(row, prompt_of(row), completion_of(row, "completion"), "label")


class Graded(Format):
    """`prompt`, `responses`, and `rewards` or `ranks` (0 or 1 is best): scored completions of one prompt."""

    name: ClassVar[str] = "graded"
    origin: ClassVar[str] = "ours"
    example: ClassVar[str] = (
        r'{"prompt": "2+2?", "responses": ["4", "5", "maybe 4"], "rewards": [1.0, 0.0, 0.5]}'
    )
    columns: ClassVar[str] = "prompt, responses, rewards or ranks (lists of equal length)"
    ranked: ClassVar[bool] = True
    prompt: ClassVar[str] = "prompt"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {cls.prompt, "responses"} <= row.keys() and len({"rewards", "ranks"} & row.keys()) == 1

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        prompt = prompt_of(row, cls.prompt)
        is_rank = "ranks" in row
        return listed(row, prompt, "responses", "ranks" if is_rank else "rewards", is_rank=is_rank)


class Posts(Graded):
    """ODPO's file: one JSON object, from each post to its `responses` and `rewards`."""

    name: ClassVar[str] = "odpo"
    origin: ClassVar[str] = "the ODPO paper's"
    example: ClassVar[str] = r'{"key": "2+2?", "responses": ["4", "5"], "rewards": [7, 1]}'
    columns: ClassVar[str] = "one JSON object: {post: {responses, rewards}}"
    prompt: ClassVar[str] = "key"


def listed(
    row: Mapping[str, Any],
    prompt: str | list[Message],
    responses: str,
    rewards: str,
    *,
    is_rank: bool = False,
) -> Preference:
    """A ranked list from a column of texts and one of numbers, of which the highest is best, or with `is_rank` the lowest."""
    texts, numbers = entries(row, responses), entries(row, rewards)
    if len(texts) != len(numbers):
        raise BadRow(f"{responses} and {rewards}: expected lists of equal length")
    scores = [finite_number(number, rewards) * (-1 if is_rank else 1) for number in numbers]
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
    """The common beginning of two conversations, up to a user or tool turn, and the rest of each."""
    first, second = ([without_weight(message) for message in side] for side in (chosen, rejected))
    if first == second:
        raise Unusable("identical_completions")
    shorter = min(len(first), len(second))
    shared = next((index for index in range(shorter) if first[index] != second[index]), shorter)
    while shared and (shared == shorter or first[shared - 1]["role"] == "assistant"):
        shared -= 1
    rest = chosen[shared:], rejected[shared:]
    if not shared or any(not side or side[0]["role"] != "assistant" for side in rest):
        raise Unusable("prompts_differ")
    return first[:shared], *rest


def last_answer(turns: list[Message], column: str) -> tuple[list[Message], list[Message]]:
    """A conversation split after its last user turn: the prompt, and the answer with its tool calls and results."""
    users = [place for place, message in enumerate(turns) if message["role"] == "user"]
    cut = users[-1] + 1 if users else sum(message["role"] == "system" for message in turns[:1])
    if not 0 < cut < len(turns):
        raise BadRow(f"{column}: expected a user turn and an assistant turn that answers it")
    check_completion(turns[cut:], column)
    return turns[:cut], turns[cut:]


def _could_be_prompt(column: str, value: Any) -> bool:
    return column in PROMPTS or isinstance(value, list | dict) or (isinstance(value, str) and " " in value)


def _common_beginning(first: str, second: str) -> str:
    """The text that both begin with, without a blank at its end, which belongs to what follows it."""
    pairs = enumerate(zip(first, second, strict=False))
    length = next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))
    return first[: length - 1] if first[:length].endswith(" ") else first[:length]


def _repeats_prompt(row: Mapping[str, Any]) -> bool:
    sides = row["chosen"], row["rejected"]
    return all(is_conversation(side) and role_of(side[0]) != "assistant" for side in sides)


def is_text(row: Mapping[str, Any], *columns: str) -> bool:
    """Whether all these columns hold text."""
    return all(isinstance(row.get(column), str) for column in columns)
