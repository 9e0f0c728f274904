"""Prompts that end with an assistant turn: the completion goes on inside that turn.

In: the prompt's messages. Out: the text up to where the turn has been written, as transformers'
`apply_chat_template(continue_final_message=True)` has it; and the conversation in which the turn is complete.
"""

from stages.data.messages import Message
from stages.data.source_row import BadRow
from stages.tokenization.completion_parts import TextPart
from stages.tokenization.shown_text import REASONING_KEYS
from stages.tokenization.turn_ends import END
from stages.tokenization.turn_places import Apply

# Names under which `align prepare` counts rows.
CONTINUED, NOT_ENDED = "assistant_turn_continued", "step_without_end_token"
CANNOT = "the prompt begins an assistant turn that cannot be continued"


def begun_turn(prompt: list[Message]) -> Message | None:
    """The assistant turn that the prompt ends with; None where it ends with another."""
    last = prompt[-1]
    if last["role"] != "assistant":
        return None
    if "tool_calls" in last:
        raise BadRow(f"{CANNOT}: it calls a tool, and the result is missing")
    return last


def begun_text(apply: Apply, prompt: list[Message]) -> str:
    """The rendering up to the end of the text of the last turn; raises `BadRow` where the template leaves that out."""
    *before, last = prompt
    # Behind the mark a blank, by whose absence one sees that the template trims the text, as transformers does it.
    text = apply([*before, {**last, "content": f"{last['content']}{END} "}], False)
    head, mark, behind = text.rpartition(END)
    if not mark:
        raise BadRow(f"{CANNOT}: the chat template does not show its text")
    return head if behind.startswith(" ") else head.rstrip()


def continued(begun: Message, turns: list[Message]) -> list[Message]:
    """The completion with the begun turn in front of its first one, which goes on inside it."""
    first, *rest = turns
    if any(first.get(key) for key in REASONING_KEYS):
        raise BadRow(f"{CANNOT}: the completion brings reasoning, which would stand before its text")
    start = begun["content"].strip()
    if start and first["content"].lstrip().startswith(start):
        raise BadRow(
            "the completion repeats the assistant turn that the prompt ends with; expected what comes after it, or a prompt without that turn"
        )
    return [{**begun, **first, "content": begun["content"] + first["content"]}, *rest]


def without_end(parts: list[TextPart], last: Message) -> list[TextPart]:
    """The parts up to the end of the text of a completion's last turn, for a completion after which the turn goes on."""
    whole, said = "".join(part.text for part in parts), last["content"]
    text = next((text for text in (said, said.strip()) if text in whole), None)  # templates trim
    if text is None:
        raise BadRow(f"{CANNOT}: the chat template does not show the text of the completion")
    end, kept = whole.rindex(text) + len(text), []
    for part in parts:
        kept.append(part._replace(text=part.text[: max(end, 0)]))
        end -= len(part.text)
    return [part for part in kept if part.text]
