"""Layouts of data sets in which a judge compared two responses or scored single ones.

Which value means "the first is better" is part of each schema and never guessed. Classes marked "From the
documented schema" were not tried on a file of that data set.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from stages.data.columns import entries, finite_number, is_absent, one_of, shown, text
from stages.data.messages import Message, as_messages, messages, prompt_of
from stages.data.source_row import BadRow
from stages.data.transcript import transcript, transcript_prompt
from stages.formats.contract import Format, Preference, assembled, pair, ranked
from stages.formats.llama_factory import instruction_of
from stages.formats.trl import is_text, listed, split_shared

TIES = ("tie", "tie (bothbad)", "tie (inconsistent)", "both_bad")


class StepDPO(Format):
    """Step-DPO (2406.18629): `prompt`, the steps already taken, and two next steps.

    As in the paper's code, the steps are the beginning of the assistant's turn (train.py), and a next step goes on from there
    without an end token behind it (stepdpo_trainer.py).
    """

    name: ClassVar[str] = "step_dpo"
    origin: ClassVar[str] = "Step-DPO †"
    example: ClassVar[str] = (
        r'{"prompt": "2+2?", "initial_reason_steps": "Step 1: I add.\nStep 2:", "chosen": "4", "rejected": "5"}'
    )
    columns: ClassVar[str] = "prompt, initial_reason_steps, chosen, rejected (texts)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return is_text(row, "prompt", "initial_reason_steps", "chosen", "rejected")

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        prompt, steps = _user(text(row, "prompt")), text(row, "initial_reason_steps")
        if steps:
            prompt.append({"role": "assistant", "content": steps})
        preference = pair(row, prompt, text(row, "chosen"), text(row, "rejected"))
        sides = [replace(candidate, ends_turn=False) for candidate in preference.candidates]
        return replace(preference, candidates=sides)


class Arena(Format):
    """Chatbot Arena and MT-bench votes: two conversations and `winner`. From the documented schema.

    `winner` is model_a, model_b or a word for a tie; lmsys/chatbot_arena_conversations, lmsys/mt_bench_human_judgments,
    lmarena-ai/arena-human-preference-140k. In MT-bench `turn` is the turn that was judged: later turns are left out, and
    earlier ones are not trained. In the arena's votes, of users, it is the number of turns, judged as a whole.
    """

    name: ClassVar[str] = "arena"
    origin: ClassVar[str] = "Chatbot Arena, MT-bench votes †"
    example: ClassVar[str] = (
        r'{"conversation_a": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], "conversation_b": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}], "winner": "model_a"}'
    )
    columns: ClassVar[str] = "conversation_a, conversation_b, winner (model_a, model_b, tie)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {"conversation_a", "conversation_b", "winner"} <= row.keys()

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        winner = one_of(row, "winner", ["model_a", "model_b", *TIES])
        first, second = (messages(row, f"conversation_{side}") for side in "ab")
        if not is_absent(row.get("turn")) and not str(row.get("judge")).startswith("arena_user"):
            turn = finite_number(row["turn"], "turn")
            first, second = _judged(first, turn), _judged(second, turn)
        prompt, first, second = split_shared(first, second)
        sides = (second, first) if winner == "model_b" else (first, second)
        return pair(row, prompt, *sides, tied=winner in TIES)


class SHP(Format):
    """Stanford Human Preferences: a post `history`, two comments, `labels` 1 where A is better.

    From the documented schema (stanfordnlp/SHP). `score_A` and `score_B`, votes, become scores.
    """

    name: ClassVar[str] = "shp"
    origin: ClassVar[str] = "Stanford †"
    example: ClassVar[str] = (
        r'{"history": "2+2?", "human_ref_A": "5", "human_ref_B": "4", "labels": 0, "score_A": 3, "score_B": 12}'
    )
    columns: ClassVar[str] = "history, human_ref_A, human_ref_B, labels (1 = A)"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {"history", "human_ref_A", "human_ref_B", "labels"} <= row.keys()

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        better, worse = ("A", "B") if one_of(row, "labels", [0, 1]) == 1 else ("B", "A")
        scores = (None, None)
        if row.get("score_A") is not None and row.get("score_B") is not None:
            scores = tuple(finite_number(row[f"score_{side}"], f"score_{side}") for side in (better, worse))
        sides = [text(row, f"human_ref_{side}") for side in (better, worse)]
        return pair(row, _user(text(row, "history")), *sides, scores=scores)  # type: ignore[arg-type]


class SafeRLHFBetter(Format):
    """PKU-SafeRLHF by helpfulness: `better_response_id` is 0 or 1. From the documented schema."""

    name: ClassVar[str] = "safe_rlhf_better"
    origin: ClassVar[str] = "PKU †, more helpful"
    example: ClassVar[str] = (
        r'{"prompt": "2+2?", "response_0": "5", "response_1": "4", "better_response_id": 1}'
    )
    columns: ClassVar[str] = "prompt, response_0, response_1, better_response_id (the more helpful)"
    column: ClassVar[str] = "better_response_id"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {"prompt", "response_0", "response_1", cls.column} <= row.keys()

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        better = one_of(row, cls.column, [0, 1])
        sides = [text(row, f"response_{side}") for side in (better, 1 - better)]
        return pair(row, _user(text(row, "prompt")), *sides)


class SafeRLHFSafer(SafeRLHFBetter):
    """PKU-SafeRLHF by harmlessness: `safer_response_id` is 0 or 1. From the documented schema."""

    name: ClassVar[str] = "safe_rlhf_safer"
    origin: ClassVar[str] = "PKU †, safer"
    example: ClassVar[str] = (
        r'{"prompt": "2+2?", "response_0": "5", "response_1": "4", "safer_response_id": 1}'
    )
    columns: ClassVar[str] = "prompt, response_0, response_1, safer_response_id (the safer)"
    column: ClassVar[str] = "safer_response_id"


class HelpSteer(Format):
    """HelpSteer: single responses with `helpfulness` 0-4; desirable from data.threshold on. From the documented schema."""

    name: ClassVar[str] = "helpsteer"
    origin: ClassVar[str] = "NVIDIA †"
    example: ClassVar[str] = r'{"prompt": "2+2?", "response": "4", "helpfulness": 4, "correctness": 4}'
    columns: ClassVar[str] = "prompt, response, helpfulness; desirable from the score data.threshold on"
    needs_threshold: ClassVar[bool] = True

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {"prompt", "response", "helpfulness"} <= row.keys()

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        score = finite_number(row.get("helpfulness"), "helpfulness")
        return assembled(row, _user(text(row, "prompt")), [(text(row, "response"), "scored", score)])


class PandaLM(Format):
    """PandaLM's test set: two responses and three votes (1, 2, or 0 for a tie); the majority decides.

    A score is the number of votes for that response. No majority is a tie.
    """

    name: ClassVar[str] = "pandalm"
    origin: ClassVar[str] = "PandaLM"
    example: ClassVar[str] = (
        r'{"instruction": "Add.", "input": "2+2", "response1": "4", "response2": "5", "annotator1": 1, "annotator2": 1, "annotator3": 0}'
    )
    columns: ClassVar[str] = "instruction, input, response1, response2, annotator1-3 (votes 0, 1, 2)"
    voters: ClassVar[tuple[str, ...]] = ("annotator1", "annotator2", "annotator3")

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {"instruction", "response1", "response2", *cls.voters} <= row.keys()

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        votes = [one_of(row, voter, [0, 1, 2]) for voter in cls.voters]
        for_first, for_second = votes.count(1), votes.count(2)
        tied = max(for_first, for_second) * 2 <= len(votes)
        sides = [(text(row, "response1"), for_first), (text(row, "response2"), for_second)]
        if for_second > for_first:
            sides.reverse()
        scores = float(sides[0][1]), float(sides[1][1])
        return pair(row, instruction_of(row), sides[0][0], sides[1][0], scores=scores, tied=tied)


class StackExchange(Format):
    """stack-exchange-paired: a `question`, and `response_j` with more votes than `response_k`."""

    name: ClassVar[str] = "stack_exchange"
    origin: ClassVar[str] = "stack-exchange-paired"
    example: ClassVar[str] = r'{"question": "2+2?", "response_j": "4", "response_k": "5"}'
    columns: ClassVar[str] = "question, response_j (the better), response_k"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {"question", "response_j", "response_k"} <= row.keys()

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        return pair(row, _user(text(row, "question")), text(row, "response_j"), text(row, "response_k"))


class Nectar(Format):
    """Nectar: an hh-style `prompt` and `answers`, each with a `rank` (1 is best). From the documented schema."""

    name: ClassVar[str] = "nectar"
    origin: ClassVar[str] = "Berkeley †"
    example: ClassVar[str] = (
        r'{"prompt": "\n\nHuman: 2+2?\n\nAssistant: ", "answers": [{"answer": "5", "rank": 2.0}, {"answer": "4", "rank": 1.0}]}'
    )
    columns: ClassVar[str] = "prompt (\\n\\nHuman: transcript), answers (answer, rank; 1 is best)"
    ranked: ClassVar[bool] = True

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {"prompt", "answers"} <= row.keys()

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        prompt = "\n\n" + text(row, "prompt").lstrip()
        turns = transcript_prompt(prompt) or transcript(prompt, "prompt")
        answers = entries(row, "answers")
        if not all(isinstance(answer, Mapping) for answer in answers):
            raise BadRow("answers: expected objects with answer and rank")
        scores = [-finite_number(answer.get("rank"), "answers.rank") for answer in answers]
        return ranked(row, turns, [text(answer, "answer") for answer in answers], scores)


class OnPolicyScores(Format):
    """princeton-nlp's and Snorkel's UltraFeedback: all responses to a prompt with a reward model's scores.

    From the documented schema. `chosen` and `rejected` there are the best and the worst of the same list.
    """

    name: ClassVar[str] = "on_policy_scores"
    origin: ClassVar[str] = "princeton-nlp, Snorkel †"
    example: ClassVar[str] = (
        r'{"prompt": "2+2?", "all_generated_responses": ["5", "4"], "all_rm_scores": [0.1, 0.9]}'
    )
    columns: ClassVar[str] = "prompt, all_generated_responses, all_rm_scores (lists of equal length)"
    ranked: ClassVar[bool] = True

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {"prompt", "all_generated_responses", "all_rm_scores"} <= row.keys()

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        prompt = prompt_of(row)
        return listed(row, as_messages(prompt, "user"), "all_generated_responses", "all_rm_scores")


def _judged(turns: list[Message], judged: float) -> list[Message]:
    """A conversation up to the answer of a turn, counted from 1, with the answers before it masked."""
    users = [place for place, message in enumerate(turns) if message["role"] == "user"]
    if judged not in range(1, len(users) + 1):
        raise BadRow(f"turn: expected a number from 1 to {len(users)}, found {shown(judged)}")
    last = users[int(judged) - 1]
    end = users[int(judged)] if judged < len(users) else len(turns)
    return [
        {**message, "weight": 0.0} if place < last and message["role"] == "assistant" else message
        for place, message in enumerate(turns[:end])
    ]


def _user(content: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]
