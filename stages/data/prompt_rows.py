"""Rows of files of prompts, for sampling and for decontamination, in any of the layouts that such files have."""

from collections.abc import Mapping
from typing import Any

from stages.data.messages import Message, messages, prompt_column, text_or_messages
from stages.data.source_row import BadRow


def asked(row: Mapping[str, Any]) -> tuple[str, str | list[Message]]:
    """The column with the row's prompt, and the prompt: a text, or messages.

    An entry of a list that is a text, or has a content and no role, as in Arena-Hard's `turns`, is a user turn. Raises
    `BadRow` where there is no prompt.
    """
    column = prompt_column(row)
    value = row[column]
    if not isinstance(value, list):
        return column, text_or_messages(row, column)
    turns = [_with_role({"content": entry} if isinstance(entry, str) else entry) for entry in value]
    return column, messages({column: turns}, column)


def user_texts(row: Mapping[str, Any]) -> list[str]:
    """The texts of all user turns of a row's prompt."""
    column, found = asked(row)
    texts = (
        [found] if isinstance(found, str) else [turn["content"] for turn in found if turn["role"] == "user"]
    )
    if not texts:
        raise BadRow(f"{column}: expected a user turn")
    return texts


def _with_role(entry: Any) -> Any:
    if isinstance(entry, Mapping) and not {"role", "from"} & entry.keys():
        return {**entry, "role": "user"}
    return entry
