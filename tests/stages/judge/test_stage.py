import json

import pytest

from cache.errors import CorruptError, DataError, UsageError
from cache.fingerprint import fingerprint
from stages.compare.completions import Completed, completions_of, paired
from stages.compare.verdicts import outcomes, read_verdicts
from stages.judge.asking import open_kept
from stages.judge.contract import Answer
from stages.judge.function import FunctionJudge
from stages.judge.stage import Asking, JudgeJob, find_verdicts, judge, judge_completions, judge_pairs

PROMPTS = ("Where does the bear live?", "What does the owl eat?", "Say something.")


def completed(model, texts, sample_index=0):
    return [
        Completed(str(number), prompt, text, sample_index, model, "stop", len(text.split()))
        for number, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True))
    ]


class Counting:
    """A judge of the test that notes what it is asked."""

    def __init__(self, verdict, compares, name="counting"):
        self.name, self.compares, self.verdict, self.questions = name, compares, verdict, []
        self.identity = {"judge": name}

    def answer(self, questions, keep):
        for place, question in enumerate(questions):
            self.questions.append(question)
            keep([(place, self.verdict(*question.texts))])


def by_length(text):
    return Answer(float(len(text)))


def first(one, other):
    return Answer(1.0)


OURS = completed("policy", ["in the wood", "mice", "x"])
THEIRS = completed("reference", ["in a den", "mice", "something long"])
PAIRS = paired(OURS, THEIRS).pairs


def test_a_preference_follows_from_two_scores_and_equal_scores_are_a_tie(context):
    found = judge_pairs(Counting(by_length, compares=False), PAIRS, Asking(), context).verdicts
    assert [verdict.preference for verdict in found] == [1, 0.5, 0]
    assert [(verdict.score, verdict.baseline_score) for verdict in found] == [(11, 8), (4, 4), (1, 14)]


def test_a_judge_that_compares_is_asked_in_both_orders_but_not_for_equal_texts(context):
    biased = Counting(first, compares=True)
    judged = judge_pairs(biased, PAIRS, Asking(), context)
    assert [question.texts for question in biased.questions] == [
        ("in the wood", "in a den"),
        ("in a den", "in the wood"),
        ("x", "something long"),
        ("something long", "x"),
    ]
    assert [(verdict.order, verdict.preference) for verdict in judged.verdicts] == [
        ("completion_first", 1),
        ("baseline_first", 0),
        (None, 0.5),
        ("completion_first", 1),
        ("baseline_first", 0),
    ]
    assert [outcome.preference for outcome in outcomes(judged.verdicts)] == [0.5, 0.5, 0.5]


def test_no_question_is_put_twice_not_even_in_another_comparison(context):
    first_time = Counting(by_length, compares=False)
    assert judge_pairs(first_time, PAIRS, Asking(), context).asked == 5  # "mice" is one question
    other = completed("another", ["in the wood", "fish", "y"])
    second_time = Counting(by_length, compares=False)
    assert judge_pairs(second_time, paired(other, THEIRS).pairs, Asking(), context).asked == 2
    assert [question.texts for question in second_time.questions] == [("fish",), ("y",)]
    assert judge_pairs(Counting(by_length, False, "another judge"), PAIRS, Asking(), context).asked == 5


def test_swapped_sides_need_no_new_verdicts_of_a_judge_that_compares(context):
    judge_pairs(Counting(first, compares=True), PAIRS, Asking(), context)
    again = Counting(first, compares=True)
    judge_pairs(again, paired(THEIRS, OURS).pairs, Asking(), context)
    assert again.questions == []


def test_what_was_answered_before_an_interruption_is_kept(context):
    def interrupted(text):
        if text == "x":
            raise KeyboardInterrupt
        return by_length(text)

    judge_ = Counting(interrupted, compares=False)
    with pytest.raises(KeyboardInterrupt):
        judge_completions(judge_, OURS, context)
    resumed = Counting(by_length, compares=False)
    assert [verdict.score for verdict in judge_completions(resumed, OURS, context).verdicts] == [11, 4, 1]
    assert [question.texts for question in resumed.questions] == [("x",)]


def test_a_cut_last_line_is_asked_again_and_a_changed_one_is_an_error(context):
    judge_completions(Counting(by_length, compares=False), OURS, context)
    [path] = open_kept(Counting(by_length, compares=False), context).folder.glob("*.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    again = Counting(by_length, compares=False)
    assert judge_completions(again, OURS, context).asked == 1
    path.write_bytes(whole.replace(b":11.0", b":12.0"))
    with pytest.raises(CorruptError, match=rf"{path.name}:1 was changed"):
        judge_completions(again, OURS, context)


def test_answers_that_are_not_final_are_not_kept(context):
    def refused(text):
        return Answer(None, "the endpoint is down", final=False) if text == "x" else by_length(text)

    verdicts = judge_completions(Counting(refused, compares=False), OURS, context).verdicts
    assert [verdict.problem for verdict in verdicts] == [None, None, "the endpoint is down"]
    assert judge_completions(Counting(by_length, compares=False), OURS, context).asked == 1


def test_the_artifact_holds_every_verdict_with_its_texts_and_is_found_again(context):
    job = JudgeJob(Counting(first, compares=True), PAIRS, Asking(prompt_price=2.0))
    made = judge(job, context)
    assert made.counts["pairs"] == 3
    assert made.counts["ties"] == 3
    lines = [json.loads(line) for line in (made.path / "verdicts.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "id": "0",
        "turn": 1,
        "sample_index": 0,
        "prompt": PROMPTS[0],
        "model": "policy",
        "completion": "in the wood",
        "finish_reason": "stop",
        "num_tokens": 3,
        "baseline_prompt": PROMPTS[0],
        "baseline_model": "reference",
        "baseline_completion": "in a den",
        "baseline_finish_reason": "stop",
        "baseline_num_tokens": 3,
        "judge": "counting",
        "judge_fingerprint": fingerprint({"judge": "counting"}),
        "preference": 1.0,
        "score": None,
        "baseline_score": None,
        "order": "completion_first",
        "problem": None,
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "cost": 0.0,
        "reply": None,
    }
    assert read_verdicts(made.path) == judge_pairs(job.judge, PAIRS, job.asking, context).verdicts
    found = find_verdicts(job, context)
    assert found is not None
    assert found.path == made.path


def test_of_a_second_turn_both_conversations_are_shown_from_where_they_differ(context):
    """MT-bench: the second question follows each model's own first answer."""

    def second_turn(model, first_answer, text):
        turns = [("user", "Hi"), ("assistant", first_answer), ("user", "Why?")]
        messages = [{"role": role, "content": content} for role, content in turns]
        return Completed("81", messages, text, 0, model, turn=2)

    pairs = paired([second_turn("policy", "Hello", "So")], [second_turn("reference", "Hey", "Thus")]).pairs
    comparing, scoring = Counting(first, compares=True), Counting(by_length, compares=False)
    for judge_ in (comparing, scoring):
        judge_pairs(judge_, pairs, Asking(), context)
    [question, _] = comparing.questions
    assert question.prompt == [{"role": "user", "content": "Hi"}]
    assert question.texts == (
        "assistant: Hello\n\nuser: Why?\n\nassistant: So",
        "assistant: Hey\n\nuser: Why?\n\nassistant: Thus",
    )
    assert [(question.prompt[1]["content"], question.texts) for question in scoring.questions] == [
        ("Hello", ("So",)),
        ("Hey", ("Thus",)),
    ]


def test_a_judge_without_any_verdict_is_an_error(context):
    silent = Counting(lambda text: Answer(None, "no verdict in the reply"), compares=False)
    with pytest.raises(DataError, match=r"no verdict on any of 6 questions.*no verdict in the reply"):
        judge_pairs(silent, PAIRS, Asking(), context)


def test_a_judge_that_compares_gives_no_scores(context):
    with pytest.raises(UsageError, match="compares two completions"):
        judge_completions(Counting(first, compares=True), OURS, context)


@pytest.fixture
def rules(tmp_path, monkeypatch):
    (tmp_path / "politeness_rules.py").write_text(
        "from math import nan\n"
        "word = 'please'\n"
        "def polite(prompt, completion): return word in completion\n"
        "def broken(prompt, completion): raise ValueError('no')\n"
        "def nothing(prompt, completion): return None\n"
        "def not_finite(prompt, completion): return nan\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "politeness_rules", raising=False)
    monkeypatch.setattr("sys.path", [str(tmp_path), *__import__("sys").path])
    return "politeness_rules"


def test_a_function_scores(context, rules):
    polite = FunctionJudge.of(f"{rules}:polite")
    entries = completed("policy", ["please go", "go", "yes please"])
    assert [verdict.score for verdict in judge_completions(polite, entries, context).verdicts] == [1, 0, 1]


def test_another_content_of_the_file_is_another_judge(rules, tmp_path):
    before = FunctionJudge.of(f"{rules}:polite").identity
    with open(tmp_path / "politeness_rules.py", "a") as file:
        file.write("# changed\n")
    assert FunctionJudge.of(f"{rules}:polite").identity != before


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("politeness_rules", "expected package.module:name"),
        ("no_such_rules:polite", "there is no module no_such_rules"),
        ("politeness_rules:rude", "rude does not exist in politeness_rules. It has: polite"),
        ("politeness_rules:word", "word is no function"),
        ("math:sqrt", "math has no Python file"),
    ],
)
def test_a_function_that_is_not_there_is_named(rules, path, message):
    with pytest.raises(UsageError, match=message):
        FunctionJudge.of(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "raised ValueError: no, for the completion 'in the wood'"),
        ("nothing", "returned None for the completion 'in the wood'; expected a finite number"),
        ("not_finite", "returned nan"),
    ],
)
def test_a_function_that_gives_no_number_is_named(context, rules, name, message):
    with pytest.raises(UsageError, match=message):
        judge_completions(FunctionJudge.of(f"{rules}:{name}"), OURS, context)


def test_completions_of_other_tools_are_read(tmp_path):
    alpaca = tmp_path / "outputs.json"
    alpaca.write_text(json.dumps([{"instruction": "Hi", "output": "Hello", "generator": "gpt"}]))
    [entry] = completions_of(alpaca)
    assert (entry.prompt, entry.completion, entry.model, entry.sample_index) == ("Hi", "Hello", "gpt", 0)
    ifeval = tmp_path / "responses.jsonl"
    ifeval.write_text('{"prompt": "Hi", "response": "Hello"}\n{"prompt": "Hi", "response": "Hey"}\n')
    assert [(entry.sample_index, entry.model) for entry in completions_of(ifeval)] == [
        (0, "responses"),
        (1, "responses"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no completions"),
        ("no JSON\n", "is not JSON"),
        ('{"prompt": "Hi"}\n', ":1 has no completion"),
        ('{"completion": "Hi"}\n', ":1: expected a prompt"),
    ],
)
def test_a_file_without_completions_is_named(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        completions_of(tmp_path / "bad.jsonl")


def test_completions_are_matched_by_prompt_and_sample():
    chat = [{"role": "user", "content": PROMPTS[0]}]
    several = [Completed("a", chat, text, index, "policy") for index, text in enumerate(("x", "y"))]
    one = [Completed("7", PROMPTS[0], "z", 0, "baseline"), Completed("8", "Unasked", "z", 0, "baseline")]
    found = paired(several, one)
    assert [(pair.completion.completion, pair.baseline.completion) for pair in found.pairs] == [
        ("x", "z"),
        ("y", "z"),
    ]
    assert (found.alone, found.baseline_alone) == (0, 1)
    with pytest.raises(DataError, match="answer no common prompt"):
        paired(several, one[1:])
