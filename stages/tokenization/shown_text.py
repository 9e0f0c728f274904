"""Whether a rendering shows what the messages say: a template may leave out a role, a field, or a part of a text.

In: messages and their rendering. A text that is not there raises `BadRow`; reasoning that is not there is returned by
name, because templates leave it out of earlier turns on purpose, and `align prepare` counts it.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from stages.data.columns import shown
from stages.data.messages import Message
from stages.data.source_row import BadRow

# Fields of a message with the reasoning before its content; the content itself may begin with it, up to END_OF_THINKING.
REASONING_KEYS = ("reasoning_content", "thinking")
END_OF_THINKING = "</think>"
PLAIN_KEYS = {"role", "content", "weight"}
THINK_TEXT = "think_text"


def are_in_order(turns: Sequence[Message], rendering: str) -> bool:
    """Whether the texts of turns without other fields stand in the rendering one after the other, as nearly always.

    Then `check_shown` finds them too; it takes ten times as long.
    """
    end = 0
    for turn in turns:
        if len(turn) > 2 and not turn.keys() <= PLAIN_KEYS:
            return False
        text = turn["content"].strip()
        end = rendering.find(text, end) + len(text)
        if end < len(text):
            return False
    return True


def check_shown(
    turns: Sequence[Message], tools: Sequence[Any] | None, rendering: str, template: str
) -> set[str]:
    """The names of the reasoning that the rendering leaves out; raises `BadRow` for any other text that it leaves out.

    A text must be there as often as the messages have it, because a short one can also be a part of another.
    """
    contents, hidden = [], set()
    for turn in turns:
        content = turn["content"]
        if END_OF_THINKING in content and not _is_in(content, rendering):
            hidden.add(THINK_TEXT)
            content = content.split(END_OF_THINKING)[-1]
        contents.append(content)
    reasoning = [(key, turn[key]) for turn in turns for key in REASONING_KEYS if key in turn]
    with_reasoning = "\0".join([*contents, *(text for _, text in reasoning)])
    hidden |= {key for key, text in reasoning if not _is_in(text, rendering, with_reasoning)}
    names = list(_function_names(turns, tools))
    everything = "\0".join([*contents, *names])
    for turn, content in zip(turns, contents, strict=True):
        if not _is_in(content, rendering, everything):
            raise BadRow(
                f"content: {template} does not show the text of the {turn['role']} turn {shown(content)}; choose another prepare.template"
            )
    for name in names:
        if not _is_in(name, rendering, everything):
            raise BadRow(
                f"tools: {template} does not show the function {shown(name)}; choose another prepare.template"
            )
    return hidden


def _function_names(turns: Sequence[Message], tools: Sequence[Any] | None) -> Iterator[str]:
    called = [call for turn in turns for call in turn.get("tool_calls", ())]
    for entry in (*called, *(tools or ())):
        name = entry.get("function", entry).get("name")
        if isinstance(name, str):
            yield name


def _is_in(text: str, rendering: str, everything: str = "") -> bool:
    """Whether the rendering has a text as often as `everything` has it, and at least once.

    Templates trim texts, change white space, and write the results of tools as JSON.
    """
    text = text.strip()
    if not text or rendering.count(text) >= (everything.count(text) or 1):
        return True
    as_json = json.dumps(text, ensure_ascii=False)[1:-1]
    rendering, text, as_json, everything = map(_squeezed, (rendering, text, as_json, everything))
    found = rendering.count(text) + (rendering.count(as_json) if as_json != text else 0)
    return found >= (everything.count(text) or 1)


def _squeezed(text: str) -> str:
    return "".join(text.split())
