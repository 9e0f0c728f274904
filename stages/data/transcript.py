r"""hh-rlhf's transcripts, texts of `\n\nHuman: ...` and `\n\nAssistant: ...` turns, as messages."""

import re

from stages.data.columns import shown
from stages.data.messages import Message
from stages.data.source_row import BadRow

_TURN = re.compile(r"\n\n(Human|Assistant):")


def transcript(value: str, column: str) -> list[Message]:
    r"""Messages of a transcript that begins with `\n\nHuman:`; an empty last Assistant turn is kept."""
    head, *pieces = _TURN.split(value)
    roles, contents = pieces[::2], pieces[1::2]
    if head.strip() or not roles or roles[0] != "Human":
        raise BadRow(f"{column}: {expected_transcript(value)}")
    names = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": names[role], "content": content.strip()}
        for role, content in zip(roles, contents, strict=True)
    ]


def transcript_prompt(value: str) -> list[Message] | None:
    """The turns of a transcript that ends where the assistant's turn begins, or inside it; None for another text."""
    if not value.startswith("\n\nHuman:"):
        return None
    turns = transcript(value, "prompt")
    if turns[-1]["role"] != "assistant":
        return None
    if not turns[-1]["content"]:
        return turns[:-1]
    # The completion goes on behind the text as it is, with the white space at its end.
    begun = value.rpartition("\n\nAssistant:")[2].lstrip()
    return [*turns[:-1], {"role": "assistant", "content": begun}]


def expected_transcript(value: str) -> str:
    """What an error message says of a text that is no transcript."""
    return f"expected a transcript from '\\n\\nHuman:' to '\\n\\nAssistant:', found {shown(value)}"
