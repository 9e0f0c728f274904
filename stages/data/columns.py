"""Columns of a source row, checked: text, messages, tools, numbers; anything else is a `BadRow` that names them.

Messages come out in one form whatever wrote them: `{"role", "content"}` with roles system, user, assistant
and tool, text parts joined, tool calls as `{"type": "function", "function": {"name", "arguments"}}`, and
`weight` on the assistant turns whose loss weight is not 1.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cache.fingerprint import canonical_json
from stages.data.readers import BadRow, Flagged

Message = dict[str, Any]
NOT_TEXT = "not_text"
ROLE_NAMES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
MESSAGE_ROLES = ("system", "user", "assistant", "tool")
# What templates read of a message. Ids, dates and the like would make equal prompts differ.
MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
# What other projects call the parts of a message.
OTHER_KEYS = {"from": "role", "value": "content", "reasoning": "reasoning_content"}
WEIGHT_KEYS = ("weight", "loss_weight")


def finite_number(value: Any, column: str) -> float:
    """A finite number."""
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise BadRow(f"{column}: expected a finite number, found {shown(value)}")


def one_of(row: Mapping[str, Any], column: str, choices: Sequence[Any]) -> Any:
    """A column that holds one of `choices`; true is not 1 and "1" is not 1."""
    value = row.get(column)
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise BadRow(
            f"{column}: expected {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}, found {shown(value)}"
        )
    return value


def truth(row: Mapping[str, Any], column: str) -> bool:
    """A column that holds true or false, or 1 or 0."""
    value = row.get(column)
    if not isinstance(value, bool) and value not in (0, 1):
        raise BadRow(f"{column}: expected true or false, found {shown(value)}")
    return bool(value)


def prompt_of(row: Mapping[str, Any], column: str = "prompt") -> str | list[Message]:
    """A column that holds a prompt, text or messages; the last message is one to be answered."""
    prompt = text_or_messages(row, column)
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise BadRow(f"{column}: ends with an assistant turn, so there is nothing to answer")
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
    """A column that holds text or messages (a list of them, or a single one)."""
    value = row.get(column)
    if isinstance(value, Mapping):
        return messages({column: [value]}, column)
    return messages(row, column) if isinstance(value, list) else text(row, column)


def text(row: Mapping[str, Any], column: str) -> str:
    """A column that holds text, encodable as UTF-8."""
    value = row.get(column)
    if isinstance(value, bool):
        # What a converter makes of an answer "true" or "no"; prepare refuses a column of nothing else.
        raise Flagged(NOT_TEXT, f"{column}: expected text, found {shown(value)}")
    if not isinstance(value, str):
        raise BadRow(f"{column}: expected text, found {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{column}: half a surrogate pair at character {error.start}, which is no text"
        ) from error
    return value


def optional_text(row: Mapping[str, Any], column: str) -> str:
    """A column that holds text, or is absent, null or blank: then the empty text."""
    return "" if row.get(column) is None or not text(row, column).strip() else text(row, column)


def entries(row: Mapping[str, Any], column: str) -> list[Any]:
    """A column that holds a list."""
    value = row.get(column)
    if not isinstance(value, list):
        raise BadRow(f"{column}: expected a list, found {shown(value)}")
    return value


def mapping(row: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """A column that holds an object."""
    value = row.get(column)
    if not isinstance(value, Mapping):
        raise BadRow(f"{column}: expected an object, found {shown(value)}")
    return value


def messages(row: Mapping[str, Any], column: str) -> list[Message]:
    """A column that holds a non-empty list of messages, `{role, content}` or `{from, value}`."""
    value = row.get(column)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRow(f"{column}: expected a non-empty list of messages, found {shown(value)}")
    return _messages_as_they_are(value) or [
        _message(message, f"{column}[{number}]") for number, message in enumerate(value)
    ]


def _messages_as_they_are(value: Sequence[Any]) -> list[Message] | None:
    """Messages of nothing but a known role and text, as nearly all are; None where one is anything else."""
    found: list[Message] = []
    for message in value:
        if type(message) is not dict or len(message) != 2:
            return None
        role, content = message.get("role"), message.get("content")
        if role not in MESSAGE_ROLES or type(content) is not str or not _is_text(content):
            return None
        found.append({"role": role, "content": content})
    return found


def _is_text(value: str) -> bool:
    """Whether text can be encoded as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping) or not is_message(value):
        raise BadRow(f"{where}: expected an object with role and content, found {shown(value)}")
    # Parquet gives every message every key of the column, most of them null.
    message: Message = {
        OTHER_KEYS.get(str(key), str(key)): part for key, part in value.items() if part is not None
    }
    role, called_role = role_of(value), value.get("role", value.get("from"))
    if role not in MESSAGE_ROLES:
        raise BadRow(f"{where}.role: expected one of {', '.join(MESSAGE_ROLES)}, found {shown(role)}")
    try:
        if isinstance(message.get("content"), list):
            message = {**message, **_parts(message["content"])}
        elif called_role == "function_call":
            message = {**message, "content": "", "tool_calls": _calls(message.get("content"))}
        elif message.get("content") is None and role == "assistant" and message.get("tool_calls"):
            message["content"] = ""  # OpenAI's null
        kept = {key: message[key] for key in MESSAGE_KEYS if key in message and message[key] != []}
        kept["content"] = text(message, "content")
        if "tool_calls" in kept:
            kept["tool_calls"] = _calls(kept["tool_calls"])
        if len(kept) > 2:
            canonical_json(kept)
        return {**kept, "role": role, **_weight(message, role)}
    except BadRow as problem:
        problem.args = (f"{where}.{problem}",)
        raise
    except (TypeError, ValueError) as error:
        raise BadRow(f"{where}: holds what is not JSON ({error})") from error


def _parts(parts: list[Any]) -> dict[str, Any]:
    """What the typed parts of a content amount to: text joined, reasoning and tool calls beside it."""
    found: dict[str, list[Any]] = {"text": [], "reasoning": [], "tool_call": []}
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in found:
            raise BadRow(
                f"content[{number}]: expected a part of type {', '.join(found)}, found {shown(part)}; images and sound are not supported"
            )
        found[kind].append(text({"text": part.get("text", part.get("value"))}, "text"))
    more: dict[str, Any] = {"content": "".join(found["text"])}
    if found["reasoning"]:
        more["reasoning_content"] = "".join(found["reasoning"])
    if found["tool_call"]:
        more["tool_calls"] = [call for value in found["tool_call"] for call in _calls(value)]
    return more


def _calls(value: Any) -> list[Message]:
    """Tool calls as templates read them: arguments as an object, not as JSON inside JSON."""
    calls = _unpacked(value, "tool_calls")
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list):
        raise BadRow(f"tool_calls: expected a list of calls, found {shown(value)}")
    result = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(f"tool_calls: expected calls with name and arguments, found {shown(call)}")
        arguments = _unpacked(function.get("arguments", {}), "tool_calls.arguments")
        result.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def _unpacked(value: Any, column: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{column}: expected JSON, found {shown(value)}") from error


def _weight(message: Mapping[str, Any], role: str) -> dict[str, float]:
    """The loss weight of a turn where it is not that of its role: 1 for the assistant, 0 for the others."""
    column = next((key for key in WEIGHT_KEYS if key in message), None)
    if column is None:
        return {}
    weight = finite_number(message[column], column)
    if weight < 0:
        raise BadRow(f"{column}: expected a weight of at least 0, found {shown(weight)}")
    if role == "assistant":
        return {} if weight == 1 else {"weight": weight}
    if weight > 0 and column == "loss_weight":
        raise BadRow(f"loss_weight: {shown(weight)} on a {role} turn, and only assistant turns are trained")
    return {}


def is_message(value: Any) -> bool:
    """Whether this is an object with a role and something said."""
    keys = set(value) if isinstance(value, Mapping) else set()
    return bool({"role", "from"} & keys) and bool({"content", "value", "tool_calls"} & keys)


def is_conversation(value: Any) -> bool:
    """Whether this is a list that begins with a message."""
    return isinstance(value, list) and bool(value) and is_message(value[0])


def role_of(message: Mapping[str, Any]) -> Any:
    """The role of a message in the words of `MESSAGE_ROLES`, where it is one of them."""
    role = message.get("role", message.get("from"))
    return ROLE_NAMES.get(role, role) if isinstance(role, str) else role


def tools_of(row: Mapping[str, Any], column: str = "tools") -> list[Any] | None:
    """A column that holds tools: a list of JSON schemas, or that list as JSON text; None where there are none."""
    value = row.get(column)
    if value is None or value == "" or value == []:
        return None
    tools = _unpacked(value, column)
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow(f"{column}: expected a list of tools, found {shown(value)}")
    try:
        canonical_json(tools)
    except (TypeError, ValueError) as error:
        raise BadRow(f"{column}: holds what is not JSON ({error})") from error
    return tools or None


def as_messages(value: str | list[Message], role: str) -> list[Message]:
    """Text as one message of `role`; messages as they are."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def shown(value: Any) -> str:
    """A value in an error message: escaped and cut."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
