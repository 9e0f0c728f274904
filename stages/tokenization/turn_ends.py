"""The tokens at which generation stops, and where they end an assistant's turn in a rendering.

In: a tokenizer, a template, and the end tokens that the model folder declares. Out: the end of a turn, in characters.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

from stages.data.messages import Message
from stages.data.source_row import BadRow

# Noncharacters of Unicode around the text of a turn; `special_token_text.py` uses others.
START, END = "\ufdec", "\ufded"
# Messages in; their rendering out.
Apply = Callable[[list[Message]], str]


class TurnEnds:
    """Finds the end of a turn: behind the first token that generation stops at."""

    def __init__(self, declared: Sequence[str], special: Sequence[str], apply: Apply) -> None:
        """`declared` are the end tokens of tokenizer and model, `special` all special tokens.

        What the template puts behind an assistant's text whether or not another turn follows adds one where it holds no
        declared token: its first special token.
        """
        self._special = tuple(special)
        own = _written_after_a_turn(apply)
        self.tokens = list(dict.fromkeys(declared))
        if self._first(own, self.tokens) is None and (found := self._first(own, self._special)) is not None:
            self.tokens.append(found[1])
        self._ends = tuple(self.tokens)

    def end_of(self, turn: str, start: int = 0) -> int:
        """Where the text of a turn ends: behind its first end token; without one behind the special token at its end, if any."""
        found = self._first(turn, self.tokens, start)
        if found is not None:
            return found[0] + len(found[1])
        stripped = turn.rstrip()
        return len(stripped) if stripped.endswith(self._special) else len(turn)

    def last_end(self, text: str) -> int:
        """Where the last end token of the text ends, 0 without one."""
        return max((text.rfind(token) + len(token) for token in self.tokens if token in text), default=0)

    def are_marks(self, text: str) -> bool:
        """Whether the text is special tokens and white space alone."""
        for token in self._special:
            text = text.replace(token, "")
        return not text.strip()

    def has_end(self, text: str) -> bool:
        """Whether the text holds an end token."""
        return self._first(text, self.tokens) is not None

    def end_at(self, text: str, start: int, end: int) -> bool:
        """Whether the text between two places ends with an end token."""
        return text.endswith(self._ends, start, end)

    def start_at(self, text: str, place: int) -> bool:
        """Whether an end token starts at a place of the text."""
        return text.startswith(self._ends, place)

    def closes(self, text: str) -> bool:
        """Whether the text ends with a token that can end a turn."""
        return text.endswith(self._special)

    def closing(self, text: str) -> str:
        """The special token with which the text ends."""
        return next(token for token in self._special if text.endswith(token))

    def length_of(self, text: str) -> int:
        """Characters of the end token with which the text ends, 0 without one."""
        if not text.endswith(self._ends):
            return 0
        return max(len(token) for token in self.tokens if text.endswith(token))

    @staticmethod
    def _first(text: str, tokens: Sequence[str], start: int = 0) -> tuple[int, str] | None:
        """Place and token of the first of `tokens` in the text; of two at one place the longer."""
        found = [(place, token) for token in tokens if (place := text.find(token, start)) >= 0]
        if len(found) < 2:
            return found[0] if found else None
        return min(found, key=lambda pair: (pair[0], -len(pair[1])))


def _written_after_a_turn(apply: Apply) -> str:
    """What a template writes behind an assistant's text, as far as the same follows in the middle and at the end."""
    ask, reply = {"role": "user", "content": "a"}, {"role": "assistant", "content": f"{START}b{END}"}
    tails = []
    for turns in ([ask, reply], [ask, reply, ask]):
        with suppress(BadRow):
            tails.append(apply(turns).rpartition(END)[2])
    return common_start(*tails) if tails else ""


def common_start(first: str, second: str | None = None) -> str:
    """The text with which both begin."""
    if second is None:
        return first
    for place, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return first[:place]
    return min(first, second, key=len)
