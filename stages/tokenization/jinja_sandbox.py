"""A chat template, rendered in a sandbox with bounds: messages and tools in, text and trained spans out.

The environment is transformers' (sandboxed Jinja, `tojson`, `raise_exception`, loop controls, the
`{% generation %}` block), with three differences: time and size are bounded, spans of `{% generation %}` come
with every rendering, and `strftime_now` answers with a fixed date, so that the same row has the same ids tomorrow.
"""

import json
import math
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cache.errors import DataError
from stages.data.messages import Message
from stages.data.source_row import BadRow

TIME_LIMIT_SECONDS = 10.0
# Characters of a rendering, or of any text a template makes on its way; bytes would be up to four times as many.
SIZE_LIMIT = 1 << 27
# Repetitions, widths and precisions beyond this have no place in a conversation.
COUNT_LIMIT = 1 << 20
# What templates that write today's date are told; Llama 3's templates fall back to the same day.
DATE = datetime(2024, 7, 26)
# What templates ask a loop.
LOOP_ATTRIBUTES = frozenset(
    {"first", "last", "index", "index0", "revindex", "revindex0", "length", "previtem", "nextitem"}
)
# Pieces of a rendering, each a few characters or a message, between two looks at the clock.
PIECES_BETWEEN_LOOKS = 64
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Excess(Exception):
    """A rendering beyond its bounds; never a fault of one row alone."""


class ChatTemplate:
    """One compiled template with the special tokens it may name."""

    def __init__(
        self,
        source: str,
        name: str,
        variables: Mapping[str, Any],
        time_limit_seconds: float = TIME_LIMIT_SECONDS,
    ) -> None:
        """Compile `source`. Raises `DataError` when it is no template; `name` is what errors call it."""
        self.source, self.name, self.variables = source, name, dict(variables)
        self.time_limit_seconds = time_limit_seconds
        self._is_watched, self._end = False, math.inf
        # Marks around `{% generation %}` blocks; random, so that no text of a row can be one.
        mark = secrets.token_hex(16)
        self._marks = (f"\0{mark}(", f"\0{mark})")
        self._split = re.compile(f"\0{mark}([()])")
        self.marks_generation = bool(GENERATION.search(source))
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.marks = self._marks
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise DataError(f"{name} is not a template: {error}, line {error.lineno}.") from error
        # Put together once; jinja would chain its globals anew for every rendering.
        self._always = {**self._template.globals, **self.variables, "documents": None}

    def mentions(self, word: str) -> bool:
        """Whether the template reads a variable or a key of this name."""
        return word in self._words

    @cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(re.findall(r"\w+", self.source))

    def render(
        self, messages: Sequence[Message], open_turn: bool, tools: Sequence[Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text and its `{% generation %}` spans, (start, end) in characters.

        Raises `BadRow` when the template refuses the messages, `DataError` when it exceeds its bounds.
        """
        if not self._is_watched:
            with self.watched():
                return self.render(messages, open_turn, tools)
        context = self._template.new_context(
            {**self._always, "messages": messages, "tools": tools, "add_generation_prompt": open_turn},
            shared=True,
        )
        pieces, size = [], 0
        try:
            self._end = time.monotonic() + self.time_limit_seconds
            for piece in self._template.root_render_func(context):
                size += len(piece)
                if size > SIZE_LIMIT:
                    raise Excess(f"wrote more than {SIZE_LIMIT:,} characters")
                pieces.append(piece)
                if not len(pieces) % PIECES_BETWEEN_LOOKS:
                    self._look()
        except (Excess, MemoryError) as error:
            what = str(error) or "needed more memory than there is"
            raise DataError(
                f"{self.name} {what} on one conversation and was stopped. Mend the template, or choose another with --set prepare.template=NAME."
            ) from error
        except Exception as error:
            raise BadRow(f"the chat template fails: {type(error).__name__}: {error}") from error
        finally:
            self._end = math.inf
        text = "".join(pieces)
        return self._spans(text) if self.marks_generation else (text, [])

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Have one timer for all renderings inside, which stops any that takes too long.

        To set an alarm for each would take longer than most renderings. Only the main thread of a POSIX process
        has a timer; elsewhere a rendering is looked at while it writes.
        """
        if self._is_watched:
            yield
            return
        self._is_watched = True
        try:
            with _timer(min(1.0, self.time_limit_seconds / 4), self._look):
                yield
        finally:
            self._is_watched = False

    def _look(self, *_: Any) -> None:
        now = time.monotonic()
        if now > self._end:
            self._end = now + self.time_limit_seconds  # not again while this goes up
            raise Excess(f"ran for more than {self.time_limit_seconds:g} seconds")

    def _spans(self, marked: str) -> tuple[str, list[tuple[int, int]]]:
        pieces = self._split.split(marked)
        text, spans, opened = pieces[0], [], 0
        for mark, piece in zip(pieces[1::2], pieces[2::2], strict=True):
            if mark == "(":
                opened = len(text)
            else:
                spans.append((opened, len(text)))
            text += piece
        return text, spans


@contextmanager
def _timer(seconds: float, look: Callable[..., None]) -> Iterator[None]:
    """Call `look` in this thread every so many seconds, where it is the main thread of a POSIX process."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: the text the assistant wrote, put between marks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        start, end = self.environment.marks  # type: ignore[attr-defined]
        return f"{start}{caller()}{end}"


class _Bounded(CodeGenerator):
    """Concatenation (`~`) and sums through the environment, which bounds them."""

    def visit_Add(self, node: nodes.Add, frame: Any) -> None:
        # A sum of several texts is one call, not one for each sign.
        parts: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):
            parts.append(left.right)
            left = left.left
        self.write("environment.added(context, (")
        for part in (left, *reversed(parts)):
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which nothing can be made enormous in one step."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    code_generator_class = _Bounded
    marks: tuple[str, str] = ("", "")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters["tojson"] = _tojson
        for name in ("center", "format", "indent", "join", "replace", "wordwrap"):
            self.filters[name] = _checked(name, self.filters[name])
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = DATE.strftime

    def getattr(self, obj: Any, attribute: str) -> Any:
        # The sandbox would inspect it anew, several times for each message.
        if type(obj) is LoopContext and attribute in LOOP_ATTRIBUTES:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            _bound(_size(left) + _size(right))
        elif operator == "*":
            _bound(_size(left) * right if isinstance(right, int) else 0)
            _bound(_size(right) * left if isinstance(left, int) else 0)
        elif operator == "%" and isinstance(left, str):
            _check("format", [left])
        elif operator == "**" and isinstance(right, int | float) and right > 64:
            raise Excess(f"computed a power of {right}")
        return super().call_binop(context, operator, left, right)

    def added(self, context: Any, parts: tuple[Any, ...]) -> Any:
        if {*map(type, parts)} == {str}:
            _bound(sum(map(len, parts)))
            return "".join(parts)
        total = parts[0]
        for part in parts[1:]:
            total = self.call_binop(context, "+", total, part)
        return total

    def concatenated(self, parts: tuple[Any, ...]) -> str:
        texts = [str(part) for part in parts]
        _bound(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Any, function: Any, /, *values: Any, **named: Any) -> Any:
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            _check(getattr(function, "__name__", ""), [owner, *values, *named.values()])
        return super().call(context, function, *values, **named)


def _checked(name: str, function: Any) -> Any:
    def checked(*values: Any, **named: Any) -> Any:
        _check(name, [*values, *named.values()])
        return function(*values, **named)

    if hasattr(function, "jinja_pass_arg"):  # how Jinja marks a filter that wants its context
        checked.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return checked


def _check(name: str, values: Sequence[Any]) -> None:
    """Refuse what would make a giant of small texts: huge numbers, wide formats, products of long texts."""
    for value in values:
        if isinstance(value, int) and abs(value) > COUNT_LIMIT:
            raise Excess(f"asked {name} for {value:,} characters")
        if name.startswith("format") and isinstance(value, str) and re.search(r"\d{7}", value):
            raise Excess("asked for a width of millions of characters")
    sizes = [size for size in map(_size, values) if size > 1000]
    _bound(math.prod(sizes) if len(sizes) > 1 else 0)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | range) else 0


def _bound(size: int) -> None:
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
