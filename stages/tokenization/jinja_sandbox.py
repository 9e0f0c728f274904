"""The sandbox in which a chat template runs: transformers' Jinja environment.

As in transformers: sandboxed Jinja, `tojson`, `raise_exception`, loop controls and the `{% generation %}` block. One
thing differs: `strftime_now` returns a fixed date, so that a row has the same ids every day. Time and memory are
limited by whoever renders (`chat_template.py`).
"""

import json
from datetime import datetime
from operator import attrgetter
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

# The date for templates that write today's; Llama 3's templates fall back to the same day.
DATE = datetime(2024, 7, 26)
# Attributes of a loop that templates read, with what reads them.
LOOP_ATTRIBUTES = {
    name: getattr(LoopContext, name).fget
    for name in ("first", "last", "index", "revindex", "revindex0", "length", "previtem", "nextitem")
} | {"index0": attrgetter("index0")}


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}`: the text of the assistant, put between the environment's marks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        start, end = self.environment.marks  # type: ignore[attr-defined]
        return f"{start}{caller()}{end}"


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, as transformers sets it up."""

    def __init__(self, marks: tuple[str, str]) -> None:
        """`marks` are written before and after the text of each `{% generation %}` block."""
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        self.marks = marks
        self.filters["tojson"] = _tojson
        self.globals.update(raise_exception=_raise_exception, strftime_now=DATE.strftime)  # pyrefly: ignore

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute, as a template reads it."""
        # The sandbox would inspect the loop again, several times for each message.
        if type(obj) is LoopContext and (read := LOOP_ATTRIBUTES.get(attribute)) is not None:
            return read(obj)
        return super().getattr(obj, attribute)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
