"""A chat template: messages and tools in, text and the spans of `{% generation %}` blocks out.

It runs in a sandbox (`jinja_sandbox.py`), and a rendering that takes too much time or memory is stopped.
"""

import math
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

from jinja2 import TemplateSyntaxError
from jinja2.runtime import Context

from cache.errors import DataError
from stages.data.messages import Message
from stages.data.source_row import BadRow
from stages.tokenization import memory_limit
from stages.tokenization.jinja_sandbox import Sandbox
from stages.tokenization.memory_limit import MemoryLimit

TIME_LIMIT_SECONDS = 10.0
# Characters of a rendering.
SIZE_LIMIT = 1 << 27
Subject = TypeVar("Subject")
Result = TypeVar("Result")
# Between two looks at time and memory.
WATCH_SECONDS = 0.1
# Pieces of a rendering (each a few characters or a message) between two checks of the clock and of the size.
PIECES_BETWEEN_CHECKS = 64
# A text that no template has by itself.
PROBE = "\ufdecb\ufded"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Excess(BaseException):
    """A template beyond its bounds. No `Exception`, because Jinja handles those of the constants that it computes."""


class ChatTemplate:
    """A compiled template with its variables, such as the special tokens it may name."""

    def __init__(
        self,
        source: str,
        name: str,
        variables: Mapping[str, Any],
        time_limit_seconds: float = TIME_LIMIT_SECONDS,
    ) -> None:
        """Compile `source`; `name` stands for it in messages. Raises `DataError` when it is not a template."""
        self.source, self.name, self.variables = source, name, dict(variables)
        self.time_limit_seconds = time_limit_seconds
        self._is_guarded, self._memory = False, MemoryLimit()
        self._deadline, self._quiet_until = math.inf, 0.0
        # Stands around `{% generation %}` blocks; random, so that no text of a row can contain it.
        mark = secrets.token_hex(16)
        self._split = re.compile(f"\0{mark}([()])")
        self.marks_generation = bool(GENERATION.search(source))
        sandbox = Sandbox((f"\0{mark}(", f"\0{mark})"))
        try:
            with self.guarded():  # because constant expressions are computed here
                self._template = self._limited(sandbox.from_string, source)
        except TemplateSyntaxError as error:
            raise DataError(f"{name} is not a template: {error}, line {error.lineno}.") from error
        # One for all renderings, with new variables in each; Jinja would copy its globals for every one.
        self._variables = {**self._template.globals, **self.variables, "documents": None}
        self._context = Context(sandbox, self._variables, self._template.name, self._template.blocks)

    def mentions(self, word: str) -> bool:
        """Whether the template reads a variable or a key of this name."""
        return word in self._words

    @cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(re.findall(r"\w+", self.source))

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, with the variables `given` besides the template's own, and its `{% generation %}` spans, (start, end) in characters.

        Raises `BadRow` when the template refuses the messages, `DataError` when it exceeds its bounds.
        """
        if self.takes_parts:
            messages = [{**turn, "content": _as_parts(turn["content"])} for turn in messages]
        if self._is_guarded:
            return self._rendered(messages, add_generation_prompt, tools, given)
        with self.guarded():
            return self._rendered(messages, add_generation_prompt, tools, given)

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template shows a text as a list of parts and not as a text, as those of models that see do."""
        for content in (PROBE, _as_parts(PROBE)):
            with suppress(BadRow), self.guarded():
                if PROBE in self._rendered([{"role": "user", "content": content}], True, None, None)[0]:
                    return content != PROBE
        return False

    def _rendered(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Any] | None,
        given: Mapping[str, Any] | None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text and spans of messages whose contents are as the template reads them."""
        context = self._context
        context.parent = {**self._variables, **given} if given else self._variables
        context.vars = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        context.exported_vars = set()
        try:
            text = self._limited(self._write, context)
        except DataError:
            raise
        except Exception as error:
            raise BadRow(f"the chat template fails: {type(error).__name__}: {error}") from error
        return self._spans(text) if self.marks_generation else (text, [])

    def _write(self, context: Any) -> str:
        """The rendering, with its marks; raises `Excess` when it exceeds its bounds."""
        stream, written, size = self._template.root_render_func(context), [], 0
        while pieces := list(islice(stream, PIECES_BETWEEN_CHECKS)):
            size += sum(map(len, pieces))
            if size > SIZE_LIMIT:
                raise Excess(f"wrote more than {SIZE_LIMIT:,} characters")
            written += pieces
            if len(pieces) == PIECES_BETWEEN_CHECKS:
                self._check_time()
        return "".join(written)

    def _limited(self, work: Callable[[Subject], Result], subject: Subject) -> Result:
        """The result of `work` on a subject; raises `DataError` where it takes too much time or memory."""
        now = time.monotonic()
        self._memory.begin(now)
        self._deadline = now + self.time_limit_seconds
        try:
            try:
                return work(subject)
            finally:
                self._deadline = math.inf  # or the timer could raise while the error is handled
        except (Excess, MemoryError) as error:
            problem = str(error) or f"needed more than {memory_limit.MEMORY_LIMIT >> 20:,} MiB of memory"
            raise DataError(
                f"{self.name} {problem} on one conversation and was stopped. Fix the template, or choose another with --set prepare.template=NAME."
            ) from error

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """One timer and one limit of memory for all renderings inside the block, which stop any that takes too much.

        To set both for each would take longer than most renderings. Only the main thread of a POSIX process
        has a timer; elsewhere the clock is checked between the pieces that a rendering writes.
        """
        if self._is_guarded:
            yield
            return
        self._is_guarded = True
        try:
            with self._memory, _timer(min(WATCH_SECONDS, self.time_limit_seconds / 4), self._watch):
                yield
        finally:
            self._is_guarded = False

    def _watch(self, *_: Any) -> None:
        """Raise `Excess` where the work has taken too much time or memory."""
        if time.monotonic() < self._quiet_until:
            return
        self._check_time()
        if self._deadline < math.inf and self._memory.is_half_used():
            self._stop("")

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            self._stop(f"ran for more than {self.time_limit_seconds:g} seconds")

    def _stop(self, problem: str) -> None:
        # Not again while the exception propagates, but after a while, because a destructor may swallow it.
        self._deadline = self._quiet_until = time.monotonic() + self.time_limit_seconds
        raise Excess(problem)

    def _spans(self, marked: str) -> tuple[str, list[tuple[int, int]]]:
        pieces = self._split.split(marked)
        text, spans, start = pieces[0], [], 0
        for mark, piece in zip(pieces[1::2], pieces[2::2], strict=True):
            if mark == "(":
                start = len(text)
            else:
                spans.append((start, len(text)))
            text += piece
        return text, spans


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


@contextmanager
def _timer(seconds: float, check: Callable[..., None]) -> Iterator[None]:
    """Call `check` in this thread every `seconds`, where it is the main thread of a POSIX process."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, check)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
