"""LLaMA-Factory's layouts: alpaca, sharegpt, ranked answers, KTO tags, and v1's typed messages.

Schema: its data/README.md and the files in its data folder. `input` follows `instruction` on a new line,
and `history` holds earlier [question, answer] turns, as there.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from stages.data.columns import entries, is_absent, optional_text, shown, text
from stages.data.messages import Message, check_prompt, completion_of, is_conversation, messages
from stages.data.source_row import BadRow
from stages.formats.contract import Format, Preference, pair, ranked
from stages.formats.trl import is_text, labelled, last_answer, shared_prompt


def instruction_of(row: Mapping[str, Any]) -> list[Message]:
    """`history`, then `instruction` and `input` as one user turn."""
    turns: list[Message] = []
    for number, exchange in enumerate([] if is_absent(row.get("history")) else entries(row, "history")):
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise BadRow(f"history[{number}]: expected [question, answer], found {shown(exchange)}")
        for role, content in zip(("user", "assistant"), exchange, strict=True):
            turns.append({"role": role, "content": text({"history": content}, "history")})
    parts = [text(row, "instruction"), optional_text(row, "input")]
    return [*turns, {"role": "user", "content": "\n".join(part for part in parts if part)}]


class AlpacaRanking(Format):
    """`instruction`, `input`, `chosen`, `rejected` texts; optional `system` and `history`."""

    name: ClassVar[str] = "llama_factory_alpaca"
    origin: ClassVar[str] = "LLaMA-Factory"
    example: ClassVar[str] = (
        r'{"instruction": "Add.", "input": "2+2", "chosen": "4", "rejected": "5", "history": [["1+1", "2"]]}'
    )
    columns: ClassVar[str] = "instruction, input, chosen, rejected (texts; optional system, history)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return is_text(row, "instruction", "chosen", "rejected") and "prompt" not in row

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        return pair(row, instruction_of(row), text(row, "chosen"), text(row, "rejected"))


class ShareGPTRanking(Format):
    """`conversations` of {from, value}, and one message `chosen` and one `rejected`; `system`, `tools`."""

    name: ClassVar[str] = "llama_factory_sharegpt"
    origin: ClassVar[str] = "LLaMA-Factory"
    example: ClassVar[str] = (
        r'{"conversations": [{"from": "human", "value": "2+2?"}], "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}}'
    )
    columns: ClassVar[str] = (
        "conversations, chosen, rejected ({from, value} messages; optional system, tools)"
    )

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {"conversations", "chosen", "rejected"} <= row.keys()

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        return pair(
            row,
            prompt_messages(row, "conversations"),
            completion_of(row, "chosen"),
            completion_of(row, "rejected"),
        )


class RankedAnswers(Format):
    """`instruction`, `input`, `output` a list of answers, best first; rank 1 has the highest score."""

    name: ClassVar[str] = "llama_factory_ranked"
    origin: ClassVar[str] = "LLaMA-Factory"
    example: ClassVar[str] = r'{"instruction": "2+2?", "input": "", "output": ["4", "maybe 4", "5"]}'
    columns: ClassVar[str] = "instruction, input, output (texts, best first; optional history)"
    ranked: ClassVar[bool] = True

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return is_text(row, "instruction") and isinstance(row.get("output"), list)

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        answers = [text({"output": answer}, "output") for answer in entries(row, "output")]
        return ranked(row, instruction_of(row), answers, [-float(rank) for rank in range(len(answers))])


class TaggedMessages(Format):
    """A conversation and whether its last answer is good: `messages` or `conversations`, `kto_tag` or `label`.

    Also ms-swift's KTO layout (`messages`, `label`).
    """

    name: ClassVar[str] = "kto_messages"
    label_columns: ClassVar[tuple[str, ...]] = ("kto_tag", "label")
    origin: ClassVar[str] = "LLaMA-Factory, ms-swift"
    example: ClassVar[str] = (
        r'{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], "label": true}'
    )
    columns: ClassVar[str] = "messages or conversations, label or kto_tag (true or false)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return (
            len({"messages", "conversations"} & row.keys()) == 1
            and len({"kto_tag", "label"} & row.keys()) == 1
            and not {"prompt", "completion", "chosen"} & row.keys()
        )

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        column = "messages" if "messages" in row else "conversations"
        prompt, completion = last_answer(messages(row, column), column)
        return labelled(row, prompt, completion, "kto_tag" if "kto_tag" in row else "label")


class TaggedAlpaca(Format):
    """`instruction`, `input`, `output`, and `kto_tag` true where the output is good."""

    name: ClassVar[str] = "llama_factory_kto"
    label_columns: ClassVar[tuple[str, ...]] = ("kto_tag",)
    origin: ClassVar[str] = "LLaMA-Factory"
    example: ClassVar[str] = r'{"instruction": "Add.", "input": "2+2", "output": "4", "kto_tag": true}'
    columns: ClassVar[str] = "instruction, input, output, kto_tag (true or false)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return is_text(row, "instruction", "output") and "kto_tag" in row

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        return labelled(row, instruction_of(row), text(row, "output"), "kto_tag")


class V1Messages(Format):
    """v1: `chosen_messages`, `rejected_messages` with typed parts and a `loss_weight` for each turn."""

    name: ClassVar[str] = "llama_factory_v1"
    origin: ClassVar[str] = "LLaMA-Factory"
    example: ClassVar[str] = (
        r'{"chosen_messages": [{"role": "user", "content": [{"type": "text", "value": "2+2?"}], "loss_weight": 0.0}, {"role": "assistant", "content": [{"type": "text", "value": "4"}], "loss_weight": 1.0}], "rejected_messages": [{"role": "user", "content": [{"type": "text", "value": "2+2?"}], "loss_weight": 0.0}, {"role": "assistant", "content": [{"type": "text", "value": "5"}], "loss_weight": 1.0}]}'
    )
    columns: ClassVar[str] = "chosen_messages, rejected_messages (whole conversations; parts, loss_weight)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return is_conversation(row.get("chosen_messages")) and is_conversation(row.get("rejected_messages"))

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        return shared_prompt(row, "chosen_messages", "rejected_messages")


def prompt_messages(row: Mapping[str, Any], column: str) -> list[Message]:
    """A conversation; where it ends with an assistant turn, the completion continues it."""
    return check_prompt(messages(row, column), column)
