"""A chat template: messages and tools in, text and the spans of `{% generation %}` blocks out.

It runs in a sandbox (`jinja_sandbox.py`), and a rendering that takes too long or grows too large is stopped.
"""

import math
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from jinja2 import TemplateSyntaxError

from cache.errors import DataError
from stages.data.messages import Message
from stages.data.source_row import BadRow
from stages.tokenization.jinja_sandbox import Excess, Sandbox, check_size

TIME_LIMIT_SECONDS = 10.0
# Pieces of a rendering (each a few characters or a message) between two checks of the clock.
PIECES_BETWEEN_CHECKS = 64
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


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
        self._has_timer, self._deadline = False, math.inf
        # Stands around `{% generation %}` blocks; random, so that no text of a row can contain it.
        mark = secrets.token_hex(16)
        self._split = re.compile(f"\0{mark}([()])")
        self.marks_generation = bool(GENERATION.search(source))
        try:
            self._template = Sandbox((f"\0{mark}(", f"\0{mark})")).from_string(source)
        except TemplateSyntaxError as error:
            raise DataError(f"{name} is not a template: {error}, line {error.lineno}.") from error
        # Merged once; Jinja would chain its globals again for every rendering.
        self._variables = {**self._template.globals, **self.variables, "documents": None}

    def mentions(self, word: str) -> bool:
        """Whether the template reads a variable or a key of this name."""
        return word in self._words

    @cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(re.findall(r"\w+", self.source))

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text and its `{% generation %}` spans, (start, end) in characters.

        Raises `BadRow` when the template refuses the messages, `DataError` when it exceeds its bounds.
        """
        if not self._has_timer:
            with self.one_timer():
                return self.render(messages, add_generation_prompt, tools)
        context = self._template.new_context(
            {
                **self._variables,
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
            },
            shared=True,
        )
        try:
            text = self._write(context)
        except (Excess, MemoryError) as error:
            problem = str(error) or "needed more memory than there is"
            raise DataError(
                f"{self.name} {problem} on one conversation and was stopped. Fix the template, or choose another with --set prepare.template=NAME."
            ) from error
        except Exception as error:
            raise BadRow(f"the chat template fails: {type(error).__name__}: {error}") from error
        return self._spans(text) if self.marks_generation else (text, [])

    def _write(self, context: Any) -> str:
        """The rendering, with its marks; raises `Excess` when it exceeds its bounds."""
        pieces, size = [], 0
        try:
            self._deadline = time.monotonic() + self.time_limit_seconds
            for piece in self._template.root_render_func(context):
                size += len(piece)
                check_size(size)
                pieces.append(piece)
                if not len(pieces) % PIECES_BETWEEN_CHECKS:
                    self._check_time()
        finally:
            self._deadline = math.inf
        return "".join(pieces)

    @contextmanager
    def one_timer(self) -> Iterator[None]:
        """One timer for all renderings inside the block; it stops any that takes too long.

        To set an alarm for each would take longer than most renderings. Only the main thread of a POSIX process
        has a timer; elsewhere the clock is checked between the pieces that a rendering writes.
        """
        if self._has_timer:
            yield
            return
        self._has_timer = True
        try:
            with _timer(min(1.0, self.time_limit_seconds / 4), self._check_time):
                yield
        finally:
            self._has_timer = False

    def _check_time(self, *_: Any) -> None:
        now = time.monotonic()
        if now > self._deadline:
            self._deadline = now + self.time_limit_seconds  # no second alarm while this exception propagates
            raise Excess(f"ran for more than {self.time_limit_seconds:g} seconds")

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
