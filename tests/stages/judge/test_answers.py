import json
from decimal import Decimal

import pytest

from cache.errors import AlignError
from stages.compare.completions import Completed
from stages.judge.answers import AnswersJudge, final_number
from stages.judge.stage import judge_completions
from stages.settings.judge import JudgeSettings


def judge_of(tmp_path, rows, **settings):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return AnswersJudge.of(JudgeSettings(answers=str(path), **settings))


def scores(judge, context, texts, prompt="How many?"):
    entries = [Completed(str(n), prompt, text, 0, "policy") for n, text in enumerate(texts)]
    return [verdict.score for verdict in judge_completions(judge, entries, context).verdicts]


def test_exact_answers_agree_but_for_white_space(tmp_path, context):
    judge = judge_of(tmp_path, [{"prompt": "How many?", "answer": "Forty two"}])
    assert scores(judge, context, ["Forty two", " Forty\n two ", "forty two", "42", ""]) == [1, 1, 0, 0, 0]


def test_numbers_are_those_after_the_mark_or_the_last_ones(tmp_path, context):
    """The layout of gsm8k: reasons with numbers in them, then `#### 1,042`."""
    rows = [{"question": "How many?", "answer": "There are 21 * 2 = <<21*2=42>>42, and 1000.\n#### 1,042"}]
    texts = ["1042", "So 2 and 1040 make $1,042.00.", "#### 1042 of 2000", "1042 or 1043", "none"]
    assert scores(judge_of(tmp_path, rows, match="number"), context, texts) == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-3", "-3"),
        ("a-3", "-3"),
        (".5", "0.5"),
        ("2.50.", "2.5"),
        ("1,234,567", "1234567"),
        ("3 - 1 = 2", "2"),
    ],
)
def test_final_numbers(text, number):
    assert final_number(text) == Decimal(number)


def test_a_prompt_without_an_answer_has_a_problem_and_no_score(tmp_path, context):
    judge = judge_of(tmp_path, [{"prompt": "How many?", "answer": "42"}])
    entries = [Completed("0", "Who?", "42", 0, "policy")]
    [verdict] = judge_completions(judge, entries, context).verdicts
    assert (verdict.score, verdict.problem) == (None, "answers.jsonl has no answer to this prompt")


@pytest.mark.parametrize(
    ("rows", "match", "message"),
    [
        ([{"answer": "42"}], "exact", ":1: expected a prompt"),
        ([{"prompt": "Q"}], "exact", ":1: expected an answer in one of the columns answer"),
        ([{"prompt": "Q", "answer": "many"}], "number", ":1: expected a number in the answer, found 'many'"),
        (
            [{"prompt": "Q", "answer": "1"}, {"prompt": "Q", "answer": "2"}],
            "exact",
            ":2: its prompt has another",
        ),
    ],
)
def test_a_wrong_file_is_named(tmp_path, rows, match, message):
    with pytest.raises(AlignError, match=message):
        judge_of(tmp_path, rows, match=match)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(AlignError, match="no such file nowhere"):
        AnswersJudge.of(JudgeSettings(answers="nowhere.jsonl"))


def test_ifeval_rules_are_those_of_its_package(tmp_path, context):
    """On what the names of two of its instructions say."""
    pytest.importorskip("lm_eval.tasks.ifeval.utils", reason="needs the extra ifeval", exc_type=ImportError)
    ids = ["punctuation:no_comma", "change_case:english_lowercase"]
    rows = [{"key": 1, "prompt": "How many?", "instruction_id_list": ids, "kwargs": [{}, {}]}]
    judge = judge_of(tmp_path, rows, match="ifeval")
    texts = [
        "there are a great many of them here",
        "there are many, many",
        "There are a great many of them here",
    ]
    assert scores(judge, context, texts) == [1, 0, 0]
