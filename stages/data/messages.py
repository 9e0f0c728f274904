"""Messages, prompts and completions of a source row, normalized to one form.

A message is `{"role", "content"}` with the roles system, user, assistant and tool. Its text parts are joined, and its
tool calls are `{"id", "type": "function", "function": {"name", "arguments"}}`, the id where the row has one. An assistant turn whose loss weight is not 1
has the key `weight`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cache.fingerprint import canonical_json
from stages.data.columns import finite_number, is_utf8, json_of, shown, text
from stages.data.source_row import BadRow

Message = dict[str, Any]
ROLE_NAMES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
MESSAGE_ROLES = ("system", "user", "assistant", "tool")
# The keys that templates read. Others, such as ids and dates, would make equal prompts differ.
MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
# Other names for keys of a message.
OTHER_KEYS = {"from": "role", "value": "content", "reasoning": "reasoning_content"}
WEIGHT_KEYS = ("weight", "loss_weight")
# Columns of a file of prompts, for sampling and for decontamination; of several the first that is not empty.
PROMPT_COLUMNS = ("prompt", "instruction", "messages", "conversations", "question", "turns", "query", "input")


def prompt_of(row: Mapping[str, Any], column: str = "prompt") -> str | list[Message]:
    """A column with a prompt: text, or messages; where they end with an assistant turn, the completion continues it."""
    prompt = text_or_messages(row, column)
    return prompt if isinstance(prompt, str) else check_prompt(prompt, column)


def check_prompt(prompt: list[Message], column: str) -> list[Message]:
    """The prompt; raises `BadRow` when it has assistant turns alone."""
    if all(turn["role"] == "assistant" for turn in prompt):
        raise BadRow(f"{column}: expected a turn of a user in the prompt, found assistant turns alone")
    return prompt


def prompt_column(row: Mapping[str, Any]) -> str:
    """The column of `PROMPT_COLUMNS` that holds the row's prompt; raises `BadRow` when none does."""
    column = next((name for name in PROMPT_COLUMNS if row.get(name)), None)
    if column is None and (empty := [name for name in PROMPT_COLUMNS if name in row]):
        raise BadRow(f"the prompt is empty: {', '.join(empty)}")
    if column is None:
        raise BadRow(
            f"expected a prompt in one of the columns {', '.join(PROMPT_COLUMNS)}, found {', '.join(sorted(row))}"
        )
    return column


def completion_of(row: Mapping[str, Any], column: str) -> str | list[Message]:
    """A column with a completion: text, or messages that begin and end with an assistant turn."""
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
    """A column with text or messages (a list of them, or a single one)."""
    value = row.get(column)
    if isinstance(value, Mapping):
        return messages({column: [value]}, column)
    return messages(row, column) if isinstance(value, list) else text(row, column)


def messages(row: Mapping[str, Any], column: str) -> list[Message]:
    """A column with a non-empty list of messages, `{role, content}` or `{from, value}`."""
    value = row.get(column)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRow(f"{column}: expected a non-empty list of messages, found {shown(value)}")
    return _plain_messages(value) or [
        _message(message, f"{column}[{number}]") for number, message in enumerate(value)
    ]


def _plain_messages(value: Sequence[Any]) -> list[Message] | None:
    """The messages where each has a known role, text, and nothing else, as nearly all do; else None."""
    found: list[Message] = []
    for message in value:
        if type(message) is not dict or len(message) != 2:
            return None
        role, content = message.get("role"), message.get("content")
        if role not in MESSAGE_ROLES or type(content) is not str or not is_utf8(content):
            return None
        found.append({"role": role, "content": content})
    return found


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
    """The keys that a content of typed parts becomes: its text joined, its reasoning and its tool calls."""
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


class ArgumentsText(dict):
    """The arguments of a tool call that the row has as a JSON text: the object, and the text for templates that need it."""

    def __init__(self, value: Mapping[str, Any], text: str) -> None:
        super().__init__(value)
        self.text = text


def _calls(value: Any) -> list[Message]:
    """Tool calls as most templates read them: with arguments as an object, not as a JSON text."""
    calls = json_of(value, "tool_calls")
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list):
        raise BadRow(f"tool_calls: expected a list of calls, found {shown(value)}")
    result = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(f"tool_calls: expected calls with name and arguments, found {shown(call)}")
        given = function.get("arguments", {})
        arguments = json_of(given, "tool_calls.arguments")
        if isinstance(given, str) and isinstance(arguments, Mapping):
            arguments = ArgumentsText(arguments, given)
        own_id = {"id": call["id"]} if isinstance(call.get("id"), str) and call["id"] else {}
        result.append(
            {**own_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
    return result


def _weight(message: Mapping[str, Any], role: str) -> dict[str, float]:
    """The key `weight` where the loss weight of a turn differs from the default, 1 for the assistant and 0 for others."""
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
    """Whether the value is an object with a role and a content."""
    keys = set(value) if isinstance(value, Mapping) else set()
    return bool({"role", "from"} & keys) and bool({"content", "value", "tool_calls"} & keys)


def is_conversation(value: Any) -> bool:
    """Whether the value is a list that begins with a message."""
    return isinstance(value, list) and bool(value) and is_message(value[0])


def role_of(message: Mapping[str, Any]) -> Any:
    """The role of a message, under its name in `MESSAGE_ROLES` where it has one."""
    role = message.get("role", message.get("from"))
    return ROLE_NAMES.get(role, role) if isinstance(role, str) else role


def as_messages(value: str | list[Message], role: str) -> list[Message]:
    """A text as one message of `role`; messages unchanged."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def tools_of(row: Mapping[str, Any], column: str = "tools") -> list[Any] | None:
    """A column with tools, a list of JSON schemas or that list as JSON text; None where there are none."""
    value = row.get(column)
    if value is None or value == "" or value == []:
        return None
    tools = json_of(value, column)
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow(f"{column}: expected a list of tools, found {shown(value)}")
    try:
        canonical_json(tools)
    except (TypeError, ValueError) as error:
        raise BadRow(f"{column}: holds what is not JSON ({error})") from error
    return tools or None


def template_kwargs_of(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The column `chat_template_kwargs`, an object or its JSON text; None where it is empty."""
    value = row.get("chat_template_kwargs")
    if value is None or value == "" or value == {}:
        return None
    given = json_of(value, "chat_template_kwargs")
    if not isinstance(given, Mapping) or {"messages", "tools", "add_generation_prompt"} & given.keys():
        raise BadRow(
            f"chat_template_kwargs: expected an object of the template's arguments, found {shown(value)}"
        )
    # Parquet gives every row every key, most of them null.
    return {str(key): part for key, part in given.items() if part is not None} or None


def without_weight(message: Message) -> Message:
    """The message without its loss weight."""
    return (
        {key: value for key, value in message.items() if key != "weight"} if "weight" in message else message
    )
