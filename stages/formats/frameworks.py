"""Layouts of other trainers and services: OpenAI, axolotl, ms-swift, NeMo-RL, HALOs, and Orca's data sets."""

from collections.abc import Mapping
from typing import Any, ClassVar

from stages.data.columns import entries, finite_number, mapping, one_of, text, truth
from stages.data.messages import (
    Message,
    as_messages,
    completion_of,
    is_conversation,
    messages,
    prompt_of,
    tools_of,
)
from stages.data.source_row import BadRow
from stages.formats.contract import Format, Preference, assembled, pair, ranked
from stages.formats.llama_factory import prompt_messages
from stages.formats.trl import is_text, labelled, last_answer


class OpenAI(Format):
    """`input` {messages, tools}, `preferred_output`, `non_preferred_output`; also Together's and Fireworks'.

    Schema: platform.openai.com/docs/guides/direct-preference-optimization.
    """

    name: ClassVar[str] = "openai"
    origin: ClassVar[str] = "OpenAI, Together, Fireworks"
    example: ClassVar[str] = (
        r'{"input": {"messages": [{"role": "user", "content": "2+2?"}], "tools": [], "parallel_tool_calls": true}, "preferred_output": [{"role": "assistant", "content": "4"}], "non_preferred_output": [{"role": "assistant", "content": "5"}]}'
    )
    columns: ClassVar[str] = "input (messages, tools), preferred_output, non_preferred_output"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {"input", "preferred_output", "non_preferred_output"} <= row.keys()

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        source = mapping(row, "input")
        sides = [completion_of(row, column) for column in ("preferred_output", "non_preferred_output")]
        return pair(row, prompt_messages(source, "messages"), *sides, tools=tools_of(source))


class Orca(Format):
    """Orca DPO pairs: `system`, `question` (Intel) or `input` (argilla), `chosen`, `rejected` texts.

    argilla's have two `generations` with a `rating` each, and the `status` tie where these are equal.
    """

    name: ClassVar[str] = "orca"
    origin: ClassVar[str] = "Intel, argilla"
    example: ClassVar[str] = r'{"system": "Be brief.", "question": "2+2?", "chosen": "4", "rejected": "5"}'
    columns: ClassVar[str] = "system, question or input, chosen, rejected (texts)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return (
            is_text(row, "chosen", "rejected")
            and len({"question", "input"} & row.keys()) == 1
            and not {"prompt", "instruction"} & row.keys()
        )

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        sides = text(row, "chosen"), text(row, "rejected")
        return pair(row, _prompt(row, "question", "input"), *sides, scores=_ratings(row, *sides))


class NamedResponses(Format):
    """`instruction` (argilla) or `prompt` (NeMo-RL's older rows), `chosen_response`, `rejected_response`."""

    name: ClassVar[str] = "chosen_response"
    origin: ClassVar[str] = "argilla, axolotl, older NeMo-RL"
    example: ClassVar[str] = r'{"instruction": "2+2?", "chosen_response": "4", "rejected_response": "5"}'
    columns: ClassVar[str] = "instruction or prompt, chosen_response, rejected_response (optional system)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {"chosen_response", "rejected_response"} <= row.keys() and len(
            {"instruction", "prompt"} & row.keys()
        ) == 1

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        sides = [completion_of(row, column) for column in ("chosen_response", "rejected_response")]
        return pair(row, _prompt(row, "instruction", "prompt"), *sides)


class AxolotlChat(Format):
    """axolotl's chat_template.default: `messages`, then one message `chosen` and one `rejected`."""

    name: ClassVar[str] = "axolotl_chat"
    origin: ClassVar[str] = "axolotl"
    example: ClassVar[str] = (
        r'{"messages": [{"role": "user", "content": "2+2?"}], "chosen": {"role": "assistant", "content": "4"}, "rejected": {"role": "assistant", "content": "5"}}'
    )
    columns: ClassVar[str] = "messages, chosen, rejected (a message, a list or a text each; optional tools)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return (
            {"messages", "chosen", "rejected"} <= row.keys()
            and not {"prompt", "conversations"} & row.keys()
            and not any(is_conversation(row[side]) and len(row[side]) > 1 for side in ("chosen", "rejected"))
        )

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        sides = [completion_of(row, column) for column in ("chosen", "rejected")]
        return pair(row, prompt_messages(row, "messages"), *sides)


class AxolotlKTO(Format):
    """axolotl's KTO rows: `instruction`, `question` or the conversation `chosen`; `completion`, `label`."""

    name: ClassVar[str] = "axolotl_kto"
    label_columns: ClassVar[tuple[str, ...]] = ("label",)
    origin: ClassVar[str] = "axolotl"
    example: ClassVar[str] = r'{"instruction": "2+2?", "completion": "4", "label": true}'
    columns: ClassVar[str] = "instruction, question or chosen, completion, label (true or false)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        prompts = {"instruction", "question", "chosen"} & row.keys()
        return {"completion", "label"} <= row.keys() and len(prompts) == 1 and "prompt" not in row

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        prompt = _prompt(row, "instruction", "question", "chosen")
        return labelled(row, prompt, completion_of(row, "completion"), "label")


class Swift(Format):
    """ms-swift: `messages` with the chosen answer inside; `rejected_response` text or `rejected_messages`."""

    name: ClassVar[str] = "ms_swift"
    origin: ClassVar[str] = "ms-swift"
    example: ClassVar[str] = (
        r'{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], "rejected_response": "5"}'
    )
    columns: ClassVar[str] = (
        "messages (ending with the chosen answer), rejected_response or rejected_messages"
    )

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return "messages" in row and len({"rejected_response", "rejected_messages"} & row.keys()) == 1

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        prompt, chosen = last_answer(messages(row, "messages"), "messages")
        if "rejected_response" in row:
            return pair(row, prompt, chosen, completion_of(row, "rejected_response"))
        other, rejected = last_answer(messages(row, "rejected_messages"), "rejected_messages")
        if other != prompt:
            raise BadRow("rejected_messages: the conversation before the answer is not that of messages")
        return pair(row, prompt, chosen, rejected)


class NeMo(Format):
    """NeMo-RL: `context` messages and `completions`, each with a `rank` (0 is best) and its messages."""

    name: ClassVar[str] = "nemo_rl"
    origin: ClassVar[str] = "NeMo-RL"
    example: ClassVar[str] = (
        r'{"context": [{"role": "user", "content": "2+2?"}], "completions": [{"rank": 0, "completion": [{"role": "assistant", "content": "4"}]}, {"rank": 1, "completion": [{"role": "assistant", "content": "5"}]}]}'
    )
    columns: ClassVar[str] = "context, completions (rank, 0 is best; completion)"
    ranked: ClassVar[bool] = True

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {"context", "completions"} <= row.keys()

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        listed = [mapping({"completions": entry}, "completions") for entry in entries(row, "completions")]
        completions = [completion_of(entry, "completion") for entry in listed]
        scores = [-finite_number(entry.get("rank"), "completions.rank") for entry in listed]
        return ranked(row, prompt_of(row, "context"), completions, scores)


class HalosBinary(Format):
    """HALOs feedback: `type` binary_feedback, `prompt` messages, `output`, `label` 1 or 0, `reward`."""

    name: ClassVar[str] = "halos_binary"
    label_columns: ClassVar[tuple[str, ...]] = ("label",)
    origin: ClassVar[str] = "HALOs"
    example: ClassVar[str] = (
        r'{"type": "binary_feedback", "prompt": [{"role": "user", "content": "2+2?"}], "output": [{"role": "assistant", "content": "4"}], "label": 1, "reward": 0.9}'
    )
    columns: ClassVar[str] = "type (binary_feedback), prompt or instruction, output, label"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return row.get("type") == "binary_feedback"

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        one_of(row, "type", ["binary_feedback"] * 2)
        side = "desirable" if truth(row, "label") else "undesirable"
        score = finite_number(row["reward"], "reward") if row.get("reward") is not None else None
        return assembled(
            row, _prompt(row, "prompt", "instruction"), [(completion_of(row, "output"), side, score)]
        )


class HalosPairwise(Format):
    """HALOs feedback: `type` pairwise_feedback, `output_A`, `output_B`, `label` 1 where A is better."""

    name: ClassVar[str] = "halos_pairwise"
    origin: ClassVar[str] = "HALOs"
    example: ClassVar[str] = (
        r'{"type": "pairwise_feedback", "prompt": [{"role": "user", "content": "2+2?"}], "output_A": [{"role": "assistant", "content": "5"}], "output_B": [{"role": "assistant", "content": "4"}], "label": 0, "reward_A": 0.1, "reward_B": 0.9}'
    )
    columns: ClassVar[str] = (
        "type (pairwise_feedback), prompt or instruction, output_A, output_B, label (1 = A)"
    )

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return row.get("type") == "pairwise_feedback"

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        one_of(row, "type", ["pairwise_feedback"] * 2)
        better, worse = ("A", "B") if truth(row, "label") else ("B", "A")
        rewards = [row.get(f"reward_{side}") for side in (better, worse)]
        scores = (None, None)
        if None not in rewards:
            scores = finite_number(rewards[0], "reward"), finite_number(rewards[1], "reward")
        sides = [completion_of(row, f"output_{side}") for side in (better, worse)]
        return pair(row, _prompt(row, "prompt", "instruction"), *sides, scores=scores)


def _ratings(row: Mapping[str, Any], *sides: str) -> tuple[float, float] | None:
    """argilla's `rating` of the two `generations`, by side; None where the row has none, or not of these texts."""
    ratings, generations = row.get("rating"), row.get("generations")
    if not isinstance(ratings, list) or not isinstance(generations, list) or len(ratings) != len(generations):
        return None
    if not set(sides) <= {value for value in generations if isinstance(value, str)}:
        return None
    chosen, rejected = (finite_number(ratings[generations.index(side)], "rating") for side in sides)
    return chosen, rejected


def _prompt(row: Mapping[str, Any], *columns: str) -> list[Message]:
    """The prompt in the first of these columns that the row has; a text becomes a user turn."""
    column = next((column for column in columns if column in row), columns[0])
    return as_messages(prompt_of(row, column), "user")
