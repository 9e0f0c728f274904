"""`align judge`: completions -> verdicts of a judge, in a file that people and `align compare` read.

A judge that scores is asked for each completion, one that compares for each pair in one or both orders. Writes
`verdicts/<judge>-<fingerprint>/verdicts.jsonl`. The answers themselves are kept by content (`asking.py`), so no question is
put twice. `judge_completions` and `judge_pairs` return verdicts without an artifact.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from cache.artifacts import Artifact
from cache.errors import DataError, UsageError
from cache.fingerprint import canonical_json, fingerprint
from stages.compare.completions import Completed, Pair
from stages.compare.verdicts import TIE, VERDICTS, Order, Verdict, outcomes, write_verdicts
from stages.data.messages import Message
from stages.generation.completion_files import instruction
from stages.judge.asking import Asked, ask, open_kept, unanswered
from stages.judge.contract import Answer, Judge, Question
from stages.runtime.context import Context

STAGE_VERSION = 1
ORDERS: tuple[Order, Order] = ("completion_first", "baseline_first")
KIND = "verdicts"


@dataclass(frozen=True)
class Asking:
    """How a judge is asked: in one or both orders, and what a million tokens cost that an endpoint reads and writes."""

    both_orders: bool = True
    prompt_price: float = 0.0
    completion_price: float = 0.0

    def orders(self, judge: Judge, pair: Pair) -> Sequence[Order]:
        """The orders in which a pair is shown to a judge that compares; none for equal texts, which are a tie."""
        first, second = _shown(pair)[1]
        if not judge.compares or first == second:
            return ()
        return ORDERS if self.both_orders else ORDERS[:1]

    def spent(self, answer: Answer) -> dict[str, Any]:
        """Tokens and cost of an answer, and the reply, as fields of a verdict."""
        price = self.prompt_price * answer.prompt_tokens + self.completion_price * answer.completion_tokens
        return {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "cost": price / 1_000_000,
            "reply": answer.reply,
        }


@dataclass(frozen=True)
class Judged:
    """Verdicts, and of how many different questions the judge was asked now; the other answers were kept ones."""

    verdicts: list[Verdict]
    asked: int


def judge_completions(judge: Judge, completions: Sequence[Completed], context: Context) -> Judged:
    """The score of each completion, in their order; raises `UsageError` for a judge that compares."""
    if judge.compares:
        raise UsageError(
            f"The judge {judge.name} compares two completions and gives no score to one. Compare pairs, or name a judge that scores: judge.function, judge.reward_model, judge.implicit or judge.answers."
        )
    asked = ask(judge, [Question(entry.prompt, (entry.completion,)) for entry in completions], context)
    whose = fingerprint(judge.identity)
    return Judged(
        [
            Verdict(entry, None, judge.name, whose, score=answer.value, problem=answer.problem)
            for entry, answer in zip(completions, asked.answers, strict=True)
        ],
        asked.asked,
    )


def judge_pairs(judge: Judge, pairs: Sequence[Pair], asking: Asking, context: Context) -> Judged:
    """The verdicts of each pair, in their order: one, or one for each order in which a judge that compares was asked."""
    asked = ask(judge, _questions(judge, pairs, asking), context)
    _refuse_if_useless(asked, judge)
    make = _compared if judge.compares else _scored
    return Judged(make(judge, pairs, asked.answers, asking), asked.asked)


def _questions(judge: Judge, pairs: Sequence[Pair], asking: Asking) -> list[Question]:
    found = []
    for pair in pairs:
        if judge.compares:
            prompt, texts = _shown(pair)
            orders = asking.orders(judge, pair)
            found += [Question(prompt, texts if order == ORDERS[0] else texts[::-1]) for order in orders]
        else:
            found += [
                Question(entry.prompt, (entry.completion,)) for entry in (pair.completion, pair.baseline)
            ]
    return found


def _shown(pair: Pair) -> tuple[str | list[Message], tuple[str, str]]:
    """What both prompts begin with, and the two texts; of a later turn these are the rest of either conversation."""
    own, other = pair.completion, pair.baseline
    if isinstance(own.prompt, str) or isinstance(other.prompt, str) or own.prompt == other.prompt:
        return own.prompt, (own.completion, other.completion)
    both = zip(own.prompt, other.prompt, strict=False)
    common = own.prompt[: sum(1 for _ in takewhile(lambda turns: turns[0] == turns[1], both))]
    rest = [
        instruction([*turns[len(common) :], {"role": "assistant", "content": completion}])
        for turns, completion in ((own.prompt, own.completion), (other.prompt, other.completion))
    ]
    return common, (rest[0], rest[1])


def _scored(judge: Judge, pairs: Sequence[Pair], answers: Sequence[Answer], asking: Asking) -> list[Verdict]:
    """Verdicts of a judge that scores: the higher score is better, equal scores are a tie."""
    whose = fingerprint(judge.identity)
    return [
        Verdict(
            pair.completion,
            pair.baseline,
            judge.name,
            whose,
            preference=_higher(own.value, other.value),
            score=own.value,
            baseline_score=other.value,
            problem=own.problem or other.problem,
        )
        for pair, own, other in zip(pairs, answers[::2], answers[1::2], strict=True)
    ]


def _higher(score: float | None, other: float | None) -> float | None:
    if score is None or other is None:
        return None
    return TIE if score == other else float(score > other)


def _compared(
    judge: Judge, pairs: Sequence[Pair], answers: Sequence[Answer], asking: Asking
) -> list[Verdict]:
    """Verdicts of a judge that compares, with the preference turned to the completion in question."""
    whose, found, left = fingerprint(judge.identity), [], iter(answers)
    for pair in pairs:
        orders = asking.orders(judge, pair)
        if not orders:
            found.append(Verdict(pair.completion, pair.baseline, judge.name, whose, preference=TIE))
        for order in orders:
            answer = next(left)
            value = answer.value
            if value is not None and order != ORDERS[0]:
                value = 1 - value
            found.append(
                Verdict(
                    pair.completion,
                    pair.baseline,
                    judge.name,
                    whose,
                    preference=value,
                    order=order,
                    problem=answer.problem,
                    **asking.spent(answer),
                )
            )
    return found


def _refuse_if_useless(asked: Asked, judge: Judge) -> None:
    problems = [answer.problem for answer in asked.answers if answer.value is None]
    if problems and len(problems) == len(asked.answers):
        raise DataError(
            f"The judge {judge.name} gave no verdict on any of {len(problems):,} questions. The first problem: {problems[0]}"
        )


@dataclass(frozen=True)
class JudgeJob:
    """A judge, and the pairs that it judges."""

    judge: Judge
    pairs: Sequence[Pair]
    asking: Asking = Asking()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The judge, the texts and models, and for a judge that compares how it is asked."""
        told = [[asdict(pair.completion), asdict(pair.baseline)] for pair in self.pairs]
        return {
            "stage_version": STAGE_VERSION,
            "judge": dict(self.judge.identity),
            "pairs": hashlib.sha256(canonical_json(told)).hexdigest(),
            **({"asking": asdict(self.asking)} if self.judge.compares else {}),
        }

    def missing(self, context: Context) -> int:
        """Number of different questions without an answer; writes nothing."""
        questions = _questions(self.judge, self.pairs, self.asking)
        return len(unanswered(self.judge, questions, open_kept(self.judge, context)))


def find_verdicts(job: JudgeJob, context: Context) -> Artifact | None:
    """The finished verdicts of this job, if there are any."""
    return context.store.find(KIND, job.judge.name, job.identity)


def judge(job: JudgeJob, context: Context) -> Artifact:
    """Ask the judge what it has not answered yet, and write all verdicts."""
    draft = context.store.draft(KIND, job.judge.name, "judge", job.identity)
    try:
        context.log(f"{job.judge.name} judges {len(job.pairs):,} pairs")
        judged = judge_pairs(job.judge, job.pairs, job.asking, context)
        write_verdicts(judged.verdicts, draft.path / VERDICTS)
        models = {"completion": job.pairs[0].completion.model, "baseline": job.pairs[0].baseline.model}
        return context.store.publish(draft, _counts(judged), models, context.config_text)
    finally:
        draft.discard()


def _counts(judged: Judged) -> dict[str, Any]:
    found = outcomes(judged.verdicts)
    problems = [verdict.problem for verdict in judged.verdicts if verdict.problem]
    return {
        "pairs": len(found),
        "verdicts": len(judged.verdicts),
        "asked": judged.asked,
        "wins": sum(outcome.preference == 1 for outcome in found),
        "ties": sum(outcome.preference == TIE for outcome in found),
        "losses": sum(outcome.preference == 0 for outcome in found),
        "without_verdict": sum(outcome.preference is None for outcome in found),
        "first_problem": problems[0] if problems else None,
        "prompt_tokens": sum(verdict.prompt_tokens for verdict in judged.verdicts),
        "completion_tokens": sum(verdict.completion_tokens for verdict in judged.verdicts),
        "cost": sum(verdict.cost for verdict in judged.verdicts),
    }
