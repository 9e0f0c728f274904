"""Arguments of a template: those that the settings give it in every rendering, and the template with them as defaults.

In: `prepare.thinking` and `prepare.chat_template_kwargs`. Out: variables of a rendering.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

# The arguments by which templates switch thinking on and off.
SWITCHES = ("enable_thinking", "thinking")


def arguments(given: Mapping[str, Any], thinking: str, mentions: Callable[[str], bool]) -> dict[str, Any]:
    """The arguments of a rendering: those of the setting `prepare.thinking`, and over them those that are given.

    `mentions` says whether the template reads a name.
    """
    switched = [name for name in SWITCHES if mentions(name)] if thinking in ("on", "off") else []
    return {**dict.fromkeys(switched, thinking == "on"), **given}


def with_defaults(given: Mapping[str, Any], source: str) -> str:
    """A template in which the arguments have these values unless others are given."""
    values = {name: "none" if value is None else json.dumps(value) for name, value in given.items()}
    sets = [
        f"{{%- if {name} is not defined -%}}{{%- set {name} = {value} -%}}{{%- endif -%}}"
        for name, value in values.items()
    ]
    return "".join(sets) + source
