"""Arguments of tool calls that a row has as a JSON text: most templates want the object, some the text.

In: a preference, and its rendering with objects. Out: the same preference with the texts, and whether it needs them.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from stages.data.messages import ArgumentsText, Message
from stages.formats.contract import Preference


def has_calls(preference: Preference) -> bool:
    """Whether a turn calls tools."""
    for side in (preference.prompt, *(candidate.completion for candidate in preference.candidates)):
        for turn in side if isinstance(side, list) else ():
            if "tool_calls" in turn:
                return True
    return False


def texts_of_arguments(preference: Preference) -> list[ArgumentsText]:
    """The arguments that the row has as texts."""
    sides = [preference.prompt, *(candidate.completion for candidate in preference.candidates)]
    turns = [turn for side in sides if isinstance(side, list) for turn in side]
    return [found for turn in turns for found in _of_turn(turn) if isinstance(found, ArgumentsText)]


def prints_objects(arguments: list[ArgumentsText], text: str) -> bool:
    """Whether a rendering has arguments as Python prints them, which no tool reads."""
    return any(found and str(dict(found)) in text for found in arguments)


def with_texts(preference: Preference) -> Preference:
    """The preference with the row's texts in place of the objects."""
    candidates = [replace(one, completion=_changed(one.completion)) for one in preference.candidates]
    return replace(preference, prompt=_changed(preference.prompt), candidates=candidates)


def _of_turn(turn: Message) -> Iterator[Any]:
    for call in turn.get("tool_calls", ()):
        yield call["function"]["arguments"]


def _changed(side: Any) -> Any:
    return (
        [_with_text(turn) if "tool_calls" in turn else turn for turn in side]
        if isinstance(side, list)
        else side
    )


def _with_text(turn: Message) -> Message:
    calls = []
    for call in turn["tool_calls"]:
        found = call["function"]["arguments"]
        given = found.text if isinstance(found, ArgumentsText) else found
        calls.append({**call, "function": {**call["function"], "arguments": given}})
    return {**turn, "tool_calls": calls}
