"""Two answers and a verdict: the general layout, and data sets and services that have one of their own.

Which value means the first answer is part of each schema. Classes with † in `origin` were built from the published
schema.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from stages.data.columns import entries, finite_number, is_absent, json_of, mapping, one_of, text
from stages.data.messages import Message, as_messages, completion_of, prompt_of
from stages.data.source_row import BadRow
from stages.formats.contract import Format, Preference, Unusable, pair, ranked
from stages.formats.labels import VERDICTS, meaning
from stages.formats.llama_factory import instruction_of
from stages.formats.trl import split_shared
from stages.settings.data import Meaning


class TwoAnswers(Format):
    """`prompt`, the answers `a` and `b`, and a `verdict` or a score of each; for any schema by `data.columns`.

    A verdict is a word for a, b or a tie, or any value by `data.labels`. Null is no verdict.
    """

    name: ClassVar[str] = "two_answers"
    origin: ClassVar[str] = "any, by `data.columns`"
    example: ClassVar[str] = r'{"prompt": "2+2?", "a": "5", "b": "4", "verdict": "B>A"}'
    columns: ClassVar[str] = "prompt, a, b, and verdict (a, b, tie, A>B, ...) or score_a, score_b"
    label_columns: ClassVar[tuple[str, ...]] = ("verdict",)
    meanings: ClassVar[tuple[Meaning, ...]] = ("a", "b", "tie")
    # The columns of prompt, a and b, then the verdict or two scores.
    parts: ClassVar[tuple[str, ...]] = ("prompt", "a", "b", "verdict")
    verdicts: ClassVar[Mapping[str, Meaning]] = VERDICTS

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        has_scores = {"score_a", "score_b"} <= row.keys()
        return {"prompt", "a", "b"} <= row.keys() and ("verdict" in row) != has_scores

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        prompt, a, b, *judged = cls.parts
        answers = completion_of(row, a), completion_of(row, b)
        if len(judged) == 1 and judged[0] not in row:
            judged = ["score_a", "score_b"]
        if any(row.get(column) in (None, "") for column in judged):
            raise Unusable("no_verdict")
        if len(judged) == 2:
            first, second = (finite_number(row[column], column) for column in judged)
            best: Meaning = "tie" if first == second else "a" if first > second else "b"
            scores: tuple[float, float] | None = max(first, second), min(first, second)
        else:
            best, margin = meaning(row[judged[0]], cls.verdicts, judged[0])
            scores = None if margin is None else (margin, 0.0)
        chosen, rejected = answers[::-1] if best == "b" else answers
        return pair(row, cls.prompt(row, prompt), chosen, rejected, scores=scores, tied=best == "tie")

    @classmethod
    def prompt(cls, row: Mapping[str, Any], column: str) -> str | list[Message]:
        """The prompt of a row; a conversation in the layouts of data sets."""
        return prompt_of(row, column)


class Judged(TwoAnswers):
    """The base of layouts with fixed columns."""

    label_columns: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return set(cls.parts) <= row.keys()

    @classmethod
    def prompt(cls, row: Mapping[str, Any], column: str) -> list[Message]:
        """A text becomes a user turn."""
        return as_messages(prompt_of(row, column), "user")


STRENGTH: Mapping[str, Meaning] = {"<0": "a", ">0": "b", "0": "tie", "-100": None}


class HelpSteer2(Judged):
    """HelpSteer2's preferences: from -3, the first is much better, to 3, the second is."""

    name: ClassVar[str] = "helpsteer2"
    origin: ClassVar[str] = "NVIDIA †"
    example: ClassVar[str] = (
        r'{"prompt": "2+2?", "response_1": "4", "response_2": "5", "preference_strength": -2}'
    )
    columns: ClassVar[str] = "prompt, response_1, response_2, preference_strength (negative = 1)"
    parts: ClassVar[tuple[str, ...]] = ("prompt", "response_1", "response_2", "preference_strength")
    verdicts: ClassVar[Mapping[str, Meaning]] = STRENGTH


class HelpSteer3(Judged):
    """HelpSteer3's preferences: a conversation and two responses, from -3, the first is much better, to 3."""

    name: ClassVar[str] = "helpsteer3"
    origin: ClassVar[str] = "NVIDIA †"
    example: ClassVar[str] = (
        r'{"context": [{"role": "user", "content": "2+2?"}], "response1": "5", "response2": "4", "overall_preference": 1}'
    )
    columns: ClassVar[str] = "context (messages), response1, response2, overall_preference (negative = 1)"
    parts: ClassVar[tuple[str, ...]] = ("context", "response1", "response2", "overall_preference")
    verdicts: ClassVar[Mapping[str, Meaning]] = STRENGTH


class LLMBar(Judged):
    """LLMBar: `label` is 1 or 2, the better output."""

    name: ClassVar[str] = "llmbar"
    origin: ClassVar[str] = "LLMBar †"
    example: ClassVar[str] = r'{"input": "2+2?", "output_1": "5", "output_2": "4", "label": 2}'
    columns: ClassVar[str] = "input, output_1, output_2, label (1 or 2)"
    parts: ClassVar[tuple[str, ...]] = ("input", "output_1", "output_2", "label")
    verdicts: ClassVar[Mapping[str, Meaning]] = {"1": "a", "2": "b"}


class JudgeBench(Judged):
    """JudgeBench: `label` is A>B or B>A."""

    name: ClassVar[str] = "judgebench"
    origin: ClassVar[str] = "JudgeBench †"
    example: ClassVar[str] = r'{"question": "2+2?", "response_A": "4", "response_B": "5", "label": "A>B"}'
    columns: ClassVar[str] = "question, response_A, response_B, label (A>B or B>A)"
    parts: ClassVar[tuple[str, ...]] = ("question", "response_A", "response_B", "label")


class MultiPref(Judged):
    """MultiPref (allenai): `overall_pref` says which completion is clearly or slightly better, or Tie."""

    name: ClassVar[str] = "multipref"
    origin: ClassVar[str] = "Ai2 †"
    example: ClassVar[str] = (
        r'{"text": "2+2?", "completion_a": "4", "completion_b": "5", "overall_pref": "A-is-clearly-better"}'
    )
    columns: ClassVar[str] = "text, completion_a, completion_b, overall_pref (A-is-clearly-better, Tie, ...)"
    parts: ClassVar[tuple[str, ...]] = ("text", "completion_a", "completion_b", "overall_pref")


class AlpacaEval(Judged):
    """Annotations of AlpacaFarm and AlpacaEval: `preference` from 1, the first, to 2, the second; 0 and 1.5 are ties."""

    name: ClassVar[str] = "alpaca_eval"
    origin: ClassVar[str] = "AlpacaFarm, AlpacaEval †"
    example: ClassVar[str] = (
        r'{"instruction": "2+2?", "output_1": "5", "output_2": "4", "preference": 1.9, "generator_1": "x"}'
    )
    columns: ClassVar[str] = "instruction, output_1, output_2, preference (1 or 2; optional input)"
    parts: ClassVar[tuple[str, ...]] = ("instruction", "output_1", "output_2", "preference")
    verdicts: ClassVar[Mapping[str, Meaning]] = {"0": "tie", "1.5": "tie", "1": "a", "2": "b", "<1.5": "a", ">1.5": "b"}  # fmt: skip

    @classmethod
    def prompt(cls, row: Mapping[str, Any], column: str) -> list[Message]:
        return instruction_of(row)


class WebGPT(Judged):
    """WebGPT's comparisons: a `question` and a score of each answer, 0 for both in a tie."""

    name: ClassVar[str] = "webgpt"
    origin: ClassVar[str] = "OpenAI †"
    example: ClassVar[str] = (
        r'{"question": {"full_text": "2+2?"}, "answer_0": "5", "answer_1": "4", "score_0": -0.5, "score_1": 0.5}'
    )
    columns: ClassVar[str] = "question (full_text), answer_0, answer_1, score_0, score_1"
    parts: ClassVar[tuple[str, ...]] = ("question", "answer_0", "answer_1", "score_0", "score_1")

    @classmethod
    def prompt(cls, row: Mapping[str, Any], column: str) -> list[Message]:
        return as_messages(text(mapping(row, column), "full_text"), "user")


class ArenaLists(Format):
    """The arena's votes as Kaggle has them: the turns of prompts and responses are lists as JSON text."""

    name: ClassVar[str] = "arena_lists"
    origin: ClassVar[str] = "Kaggle's LMSYS arena †"
    example: ClassVar[str] = (
        r'{"prompt": "[\"2+2?\"]", "response_a": "[\"5\"]", "response_b": "[\"4\"]", "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}'
    )
    columns: ClassVar[str] = "prompt, response_a, response_b (lists as JSON text), winner_model_a, winner_model_b, winner_tie"  # fmt: skip

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        winners = {f"winner_{name}" for name in ("model_a", "model_b", "tie")}
        return {"prompt", "response_a", "response_b"} | winners <= row.keys()

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        won = {name: one_of(row, f"winner_{name}", [0, 1]) for name in ("model_a", "model_b", "tie")}
        if sum(won.values()) != 1:
            raise BadRow(f"winner_model_a, winner_model_b, winner_tie: expected one 1, found {won}")
        prompt, first, second = split_shared(_turns(row, "response_a"), _turns(row, "response_b"))
        sides = (second, first) if won["model_b"] else (first, second)
        return pair(row, prompt, *sides, tied=bool(won["tie"]))


class Vertex(Format):
    """Vertex AI's preference tuning: `contents` and two `completions` with a score; parts of text."""

    name: ClassVar[str] = "vertex"
    origin: ClassVar[str] = "Google Vertex AI †"
    example: ClassVar[str] = (
        r'{"contents": [{"role": "user", "parts": [{"text": "2+2?"}]}], "completions": [{"score": 1.0, "completion": {"role": "model", "parts": [{"text": "4"}]}}, {"score": 0.0, "completion": {"role": "model", "parts": [{"text": "5"}]}}]}'
    )
    columns: ClassVar[str] = "contents (role, parts), completions (score, completion)"
    ranked: ClassVar[bool] = True

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        return {"contents", "completions"} <= row.keys()

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        listed = [mapping({"completions": entry}, "completions") for entry in entries(row, "completions")]
        scores = [finite_number(entry.get("score"), "completions.score") for entry in listed]
        answers: list[str | list[Message]] = [[_turn(entry.get("completion"), "parts")] for entry in listed]
        prompt = prompt_of(
            {"contents": [_turn(turn, "parts") for turn in entries(row, "contents")]}, "contents"
        )
        return ranked(row, prompt, answers, scores)


class Bedrock(Format):
    """Amazon Bedrock's preference tuning: the last of `messages` has two `candidates`, one of them preferred."""

    name: ClassVar[str] = "bedrock"
    origin: ClassVar[str] = "Amazon Bedrock †"
    example: ClassVar[str] = (
        r'{"messages": [{"role": "user", "content": [{"text": "2+2?"}]}, {"role": "assistant", "candidates": [{"content": [{"text": "5"}], "preferenceLabel": "non-preferred"}, {"content": [{"text": "4"}], "preferenceLabel": "preferred"}]}]}'
    )
    columns: ClassVar[str] = "messages, the last with candidates (content, preferenceLabel); optional system"

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        turns = row.get("messages")
        return (
            isinstance(turns, list)
            and bool(turns)
            and isinstance(turns[-1], Mapping)
            and "candidates" in turns[-1]
        )

    @classmethod
    def convert(cls, row: Mapping[str, Any]) -> Preference:
        *turns, last = entries(row, "messages")
        system = [] if is_absent(row.get("system")) else entries(row, "system")
        shown = [_turn({"role": "system", "content": system}, "content")] if system else []
        prompt = prompt_of({"messages": [*shown, *(_turn(turn, "content") for turn in turns)]}, "messages")
        sides = {}
        candidates = entries(mapping({"messages": last}, "messages"), "candidates")
        for candidate in candidates:
            label = one_of(mapping({"candidates": candidate}, "candidates"), "preferenceLabel", ["preferred", "non-preferred"])  # fmt: skip
            sides[label] = [_turn({**candidate, "role": "assistant"}, "content")]
        if not len(sides) == len(candidates) == 2:
            raise BadRow("candidates: expected one that is preferred and one that is non-preferred")
        # The system text is in the prompt.
        plain = {name: row.get(name) for name in ("weight", "tools", "chat_template_kwargs")}
        return pair(plain, prompt, sides["preferred"], sides["non-preferred"])


def _turns(row: Mapping[str, Any], column: str) -> list[Message]:
    """The conversation of the prompts and of a column's responses, both lists, or lists as JSON text."""
    prompts, answers = (json_of(row.get(name), name) for name in ("prompt", column))
    if not isinstance(prompts, list) or not isinstance(answers, list) or len(prompts) != len(answers):
        raise BadRow(f"prompt and {column}: expected lists of equal length")
    return [
        {"role": role, "content": text({name: value}, name)}
        for asked, answered in zip(prompts, answers, strict=True)
        for role, name, value in (("user", "prompt", asked), ("assistant", column, answered))
    ]


def _turn(value: Any, column: str) -> Message:
    """A message whose content is a list of parts with a text each; the role model is the assistant's."""
    turn = mapping({"turn": value}, "turn")
    role = {"model": "assistant"}.get(str(turn.get("role")), turn.get("role"))
    texts = [text(mapping({column: part}, column), "text") for part in entries(turn, column)]
    return {"role": role, "content": "".join(texts)}
