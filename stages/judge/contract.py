"""What a judge is asked and what it answers: the one interface of all judges.

A judge scores one text, or compares two texts in the order in which they are shown. It knows nothing of models, ids or
files, so that equal questions have one answer wherever they come from.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from cache.fingerprint import canonical_json
from stages.data.messages import Message


@dataclass(frozen=True)
class Question:
    """A prompt, and the text to score or the two texts to compare, in the order in which they are shown."""

    prompt: str | list[Message]
    texts: tuple[str, ...]

    def key(self, judge_fingerprint: str) -> str:
        """Hex sha256 of judge, prompt and texts: equal questions to one judge have one answer."""
        return hashlib.sha256(canonical_json([judge_fingerprint, self.prompt, list(self.texts)])).hexdigest()


@dataclass(frozen=True)
class Answer:
    """What a judge answers.

    value: the score of a text; of two texts 1 if the first is better, 0 if the second is, 0.5 for a tie. None if there is
        none, and `problem` says why.
    prompt_tokens, completion_tokens: tokens that an endpoint read and wrote.
    reply: the text of an endpoint's model.
    final: whether asking again is of no use; other answers are not kept.
    """

    value: float | None
    problem: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reply: str | None = None
    final: bool = True

    def as_json(self) -> dict[str, Any]:
        """What is kept of a final answer."""
        return {name: value for name, value in asdict(self).items() if name != "final"}


# Takes answers with the places of their questions, from any thread, and returns when they are kept.
Keep = Callable[[Sequence[tuple[int, Answer]]], None]


class Judge(Protocol):
    """A judge; `identity` is everything that its answers depend on, `compares` whether it is given two texts."""

    @property
    def name(self) -> str:
        """A short name for folders and tables."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What is hashed."""
        ...

    @property
    def compares(self) -> bool:
        """Whether it compares two texts; else it scores one."""
        ...

    def answer(self, questions: Sequence[Question], keep: Keep) -> None:
        """Answer every question once, in any order; `keep` is given some answers at a time, as soon as they are there."""
        ...
