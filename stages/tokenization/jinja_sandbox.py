"""The sandbox in which a chat template runs: transformers' Jinja environment, with bounds.

As in transformers: sandboxed Jinja, `tojson`, `raise_exception`, loop controls and the `{% generation %}` block. Two
things differ: sizes are bounded, and `strftime_now` returns a fixed date, so that a row has the same ids every day.
"""

import json
import math
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Characters of a rendering, or of any text a template makes on its way; bytes would be up to four times as many.
SIZE_LIMIT = 1 << 27
# Repetitions, widths and precisions beyond this have no place in a conversation.
COUNT_LIMIT = 1 << 20
# The date for templates that write today's; Llama 3's templates fall back to the same day.
DATE = datetime(2024, 7, 26)
# Attributes of a loop that templates read.
LOOP_ATTRIBUTES = frozenset(
    {"first", "last", "index", "index0", "revindex", "revindex0", "length", "previtem", "nextitem"}
)


class Excess(Exception):
    """A rendering beyond its bounds: a fault of the template, not of one row."""


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


class _BoundedCode(CodeGenerator):
    """Compiles concatenation (`~`) and sums to calls of the environment, which bounds them."""

    def visit_Add(self, node: nodes.Add, frame: Any) -> None:  # pyrefly: ignore[bad-override]
        # A sum of several texts is one call, not one for each sign.
        parts: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):
            parts.append(left.right)
            left = left.left
        self._write_call("environment.added(context, ", [left, *reversed(parts)], frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self._write_call("environment.concatenated(", node.nodes, frame)

    def _write_call(self, call: str, parts: Sequence[nodes.Node], frame: Any) -> None:
        self.write(f"{call}(")
        for part in parts:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which no single step can make an enormous value."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    code_generator_class = _BoundedCode

    def __init__(self, marks: tuple[str, str]) -> None:
        """`marks` are written before and after the text of each `{% generation %}` block."""
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        self.marks = marks
        self.filters["tojson"] = _tojson
        for name in ("center", "format", "indent", "join", "replace", "wordwrap"):
            self.filters[name] = _checked(name, self.filters[name])
        self.globals.update(raise_exception=_raise_exception, strftime_now=DATE.strftime)  # pyrefly: ignore

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute, as a template reads it."""
        # The sandbox would inspect the loop again, several times for each message.
        if type(obj) is LoopContext and attribute in LOOP_ATTRIBUTES:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`; raises `Excess` where the result would be enormous."""
        if operator == "+":
            check_size(_size(left) + _size(right))
        elif operator == "*":
            check_size(_size(left) * right if isinstance(right, int) else 0)
            check_size(_size(right) * left if isinstance(left, int) else 0)
        elif operator == "%" and isinstance(left, str):
            _check_call("format", [left])
        elif operator == "**" and isinstance(right, int | float) and right > 64:
            raise Excess(f"computed a power of {right}")
        return super().call_binop(context, operator, left, right)

    def added(self, context: Any, parts: tuple[Any, ...]) -> Any:
        """The sum of `parts`, from left to right."""
        if {*map(type, parts)} == {str}:
            check_size(sum(map(len, parts)))
            return "".join(parts)
        total = parts[0]
        for part in parts[1:]:
            total = self.call_binop(context, "+", total, part)
        return total

    def concatenated(self, parts: tuple[Any, ...]) -> str:
        """`parts` as text, joined."""
        texts = [str(part) for part in parts]
        check_size(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Any, function: Any, /, *values: Any, **named: Any) -> Any:
        """A call of a function or method; the methods of texts are bounded."""
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            _check_call(getattr(function, "__name__", ""), [owner, *values, *named.values()])
        return super().call(context, function, *values, **named)


def _checked(name: str, function: Any) -> Any:
    def checked(*values: Any, **named: Any) -> Any:
        _check_call(name, [*values, *named.values()])
        return function(*values, **named)

    if hasattr(function, "jinja_pass_arg"):  # how Jinja marks a filter that takes its context
        checked.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return checked


def _check_call(name: str, values: Sequence[Any]) -> None:
    """Refuse arguments that turn small texts into enormous ones: huge numbers, wide formats, products of long texts."""
    for value in values:
        if isinstance(value, int) and abs(value) > COUNT_LIMIT:
            raise Excess(f"called {name} with the number {value:,}")
        if name.startswith("format") and isinstance(value, str) and re.search(r"\d{7}", value):
            raise Excess("formatted with a width of millions of characters")
    sizes = [size for size in map(_size, values) if size > 1000]
    check_size(math.prod(sizes) if len(sizes) > 1 else 0)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | range) else 0


def check_size(size: int) -> None:
    """Raise `Excess` for a text of more characters than a rendering may have."""
    if size > SIZE_LIMIT:
        raise Excess(f"made a text of {size:,} characters")


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
