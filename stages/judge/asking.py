"""Puts questions to a judge, each different one once, ever.

In: a judge and questions. Out: their answers. They are kept in `judge-answers/<judge>-<fingerprint>`, whatever comparison
they were asked for, and each is on disk before the next ones are awaited.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

from cache.fingerprint import fingerprint, short
from cache.kept_answers import KeptAnswers
from stages.judge.contract import Answer, Judge, Question
from stages.runtime.context import Context, progress

FOLDER = "judge-answers"


@dataclass(frozen=True)
class Asked:
    """The answers in the order of the questions, and of how many different questions the judge was asked."""

    answers: list[Answer]
    asked: int


def open_kept(judge: Judge, context: Context) -> KeptAnswers:
    """The answers that this judge has given before."""
    name = f"{judge.name}-{short(fingerprint(judge.identity))}"
    return KeptAnswers(context.store.root / FOLDER / name)


def unanswered(judge: Judge, questions: Sequence[Question], kept: KeptAnswers) -> dict[str, Question]:
    """The different questions by key that have no answer yet."""
    whose = fingerprint(judge.identity)
    keyed = {question.key(whose): question for question in questions}
    return {key: question for key, question in keyed.items() if key not in kept}


def ask(judge: Judge, questions: Sequence[Question], context: Context) -> Asked:
    """Every answer; the judge is asked what it has not answered before."""
    kept, whose = open_kept(judge, context), fingerprint(judge.identity)
    todo = unanswered(judge, questions, kept)
    keys, passing, lock = list(todo), {}, Lock()
    with progress("judge", len(todo), "questions") as advance:

        def keep(some: Sequence[tuple[int, Answer]]) -> None:
            with lock:
                kept.add({keys[place]: answer.as_json() for place, answer in some if answer.final})
                passing.update({keys[place]: answer for place, answer in some if not answer.final})
                advance(len(some), judge.name)

        if todo:
            judge.answer(list(todo.values()), keep)
    all_keys = [question.key(whose) for question in questions]
    return Asked([passing.get(key) or Answer(**kept.get(key)) for key in all_keys], len(todo))
