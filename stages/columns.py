"""Columns of a source row, checked: text, messages, numbers; anything else is a `BadRow` that names them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cache.fingerprint import canonical_json
from stages.reading import BadRow

Message = dict[str, Any]
ROLE_NAMES = {"developer": "system", "human": "user", "gpt": "assistant"}
MESSAGE_ROLES = ("system", "user", "assistant", "tool")
# What templates read of a message. Ids, dates and the like would make equal prompts differ.
MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")


def finite_number(value: Any, column: str) -> float:
    """A finite number."""
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise BadRow(f"{column}: expected a finite number, found {shown(value)}")


def prompt_of(row: Mapping[str, Any]) -> str | list[Message]:
    """The `prompt` column, text or messages; the last message is one to be answered."""
    prompt = text_or_messages(row, "prompt")
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise BadRow("prompt: ends with an assistant turn, so there is nothing to answer")
    return prompt


def completion_of(row: Mapping[str, Any], column: str) -> str | list[Message]:
    """A column that holds a completion, text or messages, which begin and end with an assistant turn."""
    completion = text_or_messages(row, column)
    if not isinstance(completion, str):
        check_completion(completion, column)
    return completion


def check_completion(completion: list[Message], column: str) -> None:
    """Raise `BadRow` when a completion does not begin and end with an assistant turn."""
    for place, message in (("begin", completion[0]), ("end", completion[-1])):
        if message["role"] != "assistant":
            raise BadRow(
                f"{column}: expected a completion that {place}s with an assistant turn, found a {message['role']} turn"
            )


def text_or_messages(row: Mapping[str, Any], column: str) -> str | list[Message]:
    """A column that holds text or messages."""
    return messages(row, column) if isinstance(row.get(column), list) else text(row, column)


def text(row: Mapping[str, Any], column: str) -> str:
    """A column that holds text, encodable as UTF-8."""
    value = row.get(column)
    if not isinstance(value, str):
        raise BadRow(f"{column}: expected text, found {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{column}: half a surrogate pair at character {error.start}, which is no text"
        ) from error
    return value


def messages(row: Mapping[str, Any], column: str) -> list[Message]:
    """A column that holds a non-empty list of `{role, content}` messages."""
    value = row.get(column)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRow(f"{column}: expected a non-empty list of messages, found {shown(value)}")
    checked = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise BadRow(
                f"{column}[{number}]: expected an object with role and content, found {shown(message)}"
            )
        role = role_of(message)
        if role not in MESSAGE_ROLES:
            raise BadRow(
                f"{column}[{number}].role: expected one of {', '.join(MESSAGE_ROLES)}, found {shown(role)}"
            )
        try:
            text(message, "content")
            # Parquet gives every message every key of the column, most of them null.
            kept = {key: message[key] for key in MESSAGE_KEYS if message.get(key) is not None}
            if len(kept) > 2:
                canonical_json(kept)
        except BadRow as problem:
            raise BadRow(f"{column}[{number}].{problem}") from problem
        except (TypeError, ValueError) as error:
            raise BadRow(f"{column}[{number}]: holds what is not JSON ({error})") from error
        checked.append({**kept, "role": role})
    return checked


def role_of(message: Mapping[str, Any]) -> Any:
    """The role of a message in the words of `MESSAGE_ROLES`, where it is one of them."""
    role = message.get("role")
    return ROLE_NAMES.get(role, role) if isinstance(role, str) else role


def as_messages(value: str | list[Message], role: str) -> list[Message]:
    """Text as one message of `role`; messages as they are."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def shown(value: Any) -> str:
    """A value in an error message: escaped and cut."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
