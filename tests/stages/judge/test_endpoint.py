import math
import os
import re
import signal
import threading

import pytest

from cache.errors import AlignError, DataError, MachineError, UsageError
from stages.compare.comparison import Against
from stages.compare.completions import Completed, paired
from stages.compare.verdicts import outcomes
from stages.judge.endpoint import EndpointJudge
from stages.judge.stage import Asking, judge_pairs
from stages.judge.template import NAMES, JudgeTemplate
from stages.settings.judge import JudgeSettings
from tests.stages.judge.stub_endpoint import Response, fails, says, stub_endpoint

NUMBER = 6
OURS = [Completed(str(n), f"Prompt {n}", f"ours {n} " + "x" * n, 0, "policy") for n in range(NUMBER)]
THEIRS = [Completed(str(n), f"Prompt {n}", f"theirs {n}", 0, "reference") for n in range(NUMBER)]
PAIRS = paired(OURS, THEIRS).pairs
TEXTS = re.compile(r"answer of assistant A\]\n(.*?)\n\[End.*answer of assistant B\]\n(.*?)\n\[End", re.DOTALL)


def shown(request):
    """The two texts of a question, in their order."""
    return TEXTS.search(request["messages"][-1]["content"]).groups()


def ours_wins(stub, request):
    return says(f"The better one is [[{'A' if shown(request)[0].startswith('ours') else 'B'}]]")


def judge_of(stub, **settings):
    return EndpointJudge.of(JudgeSettings(endpoint=stub.url, **settings))


def preferences(stub, context, pairs=PAIRS, both_orders=True, **settings):
    verdicts = judge_pairs(judge_of(stub, **settings), pairs, Asking(both_orders), context).verdicts
    return [outcome.preference for outcome in outcomes(verdicts)]


@pytest.mark.slow
def test_each_pair_is_asked_in_both_orders_with_the_settings(context):
    with stub_endpoint(ours_wins) as stub:
        assert preferences(stub, context, temperature=0.5, max_tokens=77) == [1] * NUMBER
    assert sorted(map(shown, stub.requests)) == sorted(
        texts
        for pair in PAIRS
        for texts in (
            (pair.completion.completion, pair.baseline.completion),
            (pair.baseline.completion, pair.completion.completion),
        )
    )
    request = stub.requests[0]
    assert (request["model"], request["temperature"], request["max_completion_tokens"]) == ("stub", 0.5, 77)


def test_tokens_and_cost_are_counted(context):
    with stub_endpoint(lambda stub, request: says("[[C]]", prompt_tokens=300, completion_tokens=20)) as stub:
        verdicts = judge_pairs(judge_of(stub), PAIRS, Asking(True, 2.0, 10.0), context).verdicts
    assert len(verdicts) == 2 * NUMBER
    assert {verdict.cost for verdict in verdicts} == {(300 * 2.0 + 20 * 10.0) / 1e6}
    assert {verdict.preference for verdict in verdicts} == {0.5}


FAILURES = {
    "429": fails(429, Retry_After="0.01"),
    "500": fails(500, Retry_After_Ms="5"),
    "503": fails(503, Retry_After_Ms="5"),
    "cut connection": Response(body={"choices": []}, cut=True),
    "no choices": Response(body={"id": "1", "object": "chat.completion", "choices": []}),
    "null choices": Response(body={"error": "overloaded"}),
    "no JSON": Response(body=b"<html>Bad gateway</html>", content_type="text/html"),
    "broken JSON": Response(body=b'{"choices": [', content_type="application/json"),
}


def test_every_passing_failure_is_tried_again(context):
    """All at the same time, because the package waits half a second after some of them."""
    kinds = list(FAILURES)
    pairs = paired(
        [Completed(str(n), f"Prompt {n}", f"ours {n}", 0, "policy") for n in range(len(kinds))],
        [Completed(str(n), f"Prompt {n}", f"theirs {n}", 0, "reference") for n in range(len(kinds))],
    ).pairs

    def fails_once(stub, request):
        if stub.seen_before(request) == 0:
            return FAILURES[kinds[int(shown(request)[0].split()[1])]]
        return ours_wins(stub, request)

    with stub_endpoint(fails_once) as stub:
        assert preferences(stub, context, pairs, both_orders=False, concurrency=8) == [1] * len(kinds)
    assert sorted(stub.questions) == sorted([*dict.fromkeys(stub.questions)] * 2)


@pytest.mark.parametrize(
    ("response", "error", "message"),
    [
        (FAILURES["429"], MachineError, "no answer, after 1 retries.*429.*type the same command again"),
        (FAILURES["500"], MachineError, "no answer, after 1 retries.*status 500 of the stub"),
        (FAILURES["no JSON"], MachineError, "no chat completion, 2 times.*Bad gateway"),
        (FAILURES["no choices"], MachineError, "no chat completion, 2 times"),
        (fails(401), UsageError, "refuses access.*judge.api_key_variable"),
        (fails(404), UsageError, "no such address or model.*with /v1"),
    ],
    ids=["429", "500", "no JSON", "no choices", "401", "404"],
)
def test_a_failure_that_stays_ends_the_run_and_keeps_what_was_answered(context, response, error, message):
    def fails_for_one(stub, request):
        return response if "ours 3" in shown(request)[0] else ours_wins(stub, request)

    with stub_endpoint(fails_for_one) as stub:
        with pytest.raises(error, match=message):
            preferences(stub, context, max_retries=1, concurrency=1)
        answered = [
            question for question in stub.questions if "answer of assistant A]\nours 3" not in question
        ]
        stub.reply = ours_wins
        assert preferences(stub, context) == [1] * NUMBER
    assert [stub.questions.count(question) for question in answered] == [1] * len(answered)
    assert len(answered) == 6, "those of the pairs 0, 1 and 2, and none after the failure"


def test_a_cut_connection_that_stays_and_a_server_that_is_not_there_are_named(context):
    cut = stub_endpoint(lambda stub, request: FAILURES["cut connection"])
    with cut as stub, pytest.raises(MachineError, match="no answer, without a retry"):
        preferences(stub, context, max_retries=0)
    with pytest.raises(MachineError, match=f"no answer, without a retry. {stub.url}: Connection error"):
        preferences(stub, context, max_retries=0, endpoint_model="x")  # the stub is closed


def test_an_interrupted_run_asks_nothing_twice(context):
    """Ctrl-C arrives while two requests are under way: their answers are kept, too."""

    arrived = threading.Event()

    def arrives(signum, frame):
        arrived.set()
        raise KeyboardInterrupt

    def interrupts(stub, request):
        if stub.requests[4:5] == [request]:
            os.kill(os.getpid(), signal.SIGINT)
        if len(stub.requests) >= 5:
            arrived.wait(60)  # or every question would be answered before the main thread has its turn
        return ours_wins(stub, request)

    before = signal.signal(signal.SIGINT, arrives)
    with stub_endpoint(interrupts) as stub:
        try:
            with pytest.raises(KeyboardInterrupt):
                preferences(stub, context, concurrency=2)
        finally:
            signal.signal(signal.SIGINT, before)
        assert 5 <= len(stub.requests) < 2 * NUMBER
        assert preferences(stub, context) == [1] * NUMBER
        assert len(stub.questions) == len(set(stub.questions)) == 2 * NUMBER


@pytest.mark.slow
@pytest.mark.parametrize(
    "reply",
    ["", "Both are fine.", "Either [[A]] or [[B]]", "[[a]]", "[[D]]", "A", None],
)
def test_a_reply_without_one_verdict_is_counted_and_never_guessed(context, reply):
    def once(stub, request):
        return says(reply) if "ours 2" in shown(request)[0] else ours_wins(stub, request)

    with stub_endpoint(once) as stub:
        verdicts = judge_pairs(judge_of(stub), PAIRS, Asking(), context).verdicts
    found = outcomes(verdicts)
    assert [outcome.preference for outcome in found] == [1, 1, None, 1, 1, 1]
    assert "no verdict, or more than one, in the reply" in found[2].problem
    assert Against.of(verdicts).rate.without_verdict == 1


def test_a_reply_that_was_cut_off_says_so_and_is_not_asked_again(context):
    def cut(stub, request):
        return says("I think", "length") if "ours 2" in shown(request)[0] else ours_wins(stub, request)

    with stub_endpoint(cut) as stub:
        found = judge_pairs(judge_of(stub), PAIRS, Asking(False), context).verdicts
        assert "cut off at judge.max_tokens=1024: I think" in found[2].problem
        assert judge_pairs(judge_of(stub), PAIRS, Asking(False), context).asked == 0


@pytest.mark.slow
def test_a_question_that_the_endpoint_refuses_does_not_stop_the_others_and_is_not_kept(context):
    def too_long(stub, request):
        return fails(400) if "ours 2" in shown(request)[0] else ours_wins(stub, request)

    with stub_endpoint(too_long) as stub:
        found = judge_pairs(judge_of(stub), PAIRS, Asking(False), context).verdicts
        assert "refused the question" in found[2].problem
        assert judge_pairs(judge_of(stub), PAIRS, Asking(False), context).asked == 1
    with (
        stub_endpoint(lambda stub, request: fails(400)) as stub,
        pytest.raises(DataError, match="no verdict on any"),
    ):
        preferences(stub, context)


@pytest.mark.slow
def test_a_judge_that_always_takes_the_first_is_found_by_the_position_bias(context):
    with stub_endpoint(lambda stub, request: says("[[A]]")) as stub:
        against = Against.of(judge_pairs(judge_of(stub), PAIRS, Asking(), context).verdicts)
    assert (against.rate.rate, against.rate.ties) == (0.5, NUMBER)
    assert (against.position.first_wins, against.position.disagreements) == (1.0, NUMBER)


@pytest.mark.slow
def test_a_judge_that_loves_length_is_found_by_the_length_controlled_rate(context):
    """Its verdicts follow the difference in length alone: sigmoid(difference / 2), at each difference as evenly as six
    pairs can. Ours are longer by 1 on average, so it prefers them; at equal length it prefers none.
    """
    texts = [(n, n % 7 - 2, (n // 7 + 0.5) / 6) for n in range(42)]
    levels = {f"{n:02}": level for n, _, level in texts}
    ours = [
        Completed(str(n), f"Prompt {n}", f"{n:02}" + "o" * (4 + more), 0, "policy") for n, more, _ in texts
    ]
    theirs = [Completed(str(n), f"Prompt {n}", f"{n:02}tttt", 0, "reference") for n, _, _ in texts]

    def longer(stub, request):
        first, second = shown(request)
        return says(
            "[[A]]" if 1 / (1 + math.exp((len(second) - len(first)) / 2)) > levels[first[:2]] else "[[B]]"
        )

    with stub_endpoint(longer) as stub:
        judged = judge_pairs(judge_of(stub), paired(ours, theirs).pairs, Asking(both_orders=False), context)
    against = Against.of(judged.verdicts)
    assert against.rate.rate > 0.58
    assert against.length_controlled.rate == pytest.approx(0.5, abs=0.02)
    assert against.length_controlled.slope > 0.5


@pytest.mark.slow
def test_the_key_is_sent_and_neither_stored_nor_shown(context, monkeypatch):
    secret = "sk-very-secret"
    monkeypatch.setenv("JUDGE_KEY", secret)
    with stub_endpoint(ours_wins) as stub:
        preferences(stub, context, api_key_variable="JUDGE_KEY")
        assert set(stub.keys) == {f"Bearer {secret}"}
        stub.reply = lambda stub, request: Response(401, {"error": {"message": f"Wrong key {secret}"}})
        with pytest.raises(UsageError) as refused:
            preferences(stub, context, api_key_variable="JUDGE_KEY", max_tokens=7)
    assert secret not in str(refused.value)
    assert "Wrong key ***" in str(refused.value)
    stored = b"".join(path.read_bytes() for path in context.store.root.rglob("*") if path.is_file())
    assert stored
    assert secret.encode() not in stored


def test_a_key_that_is_not_set_is_named_before_any_request(context, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with stub_endpoint(ours_wins) as stub, pytest.raises(UsageError, match="variable JUDGE_KEY"):
        preferences(stub, context, api_key_variable="JUDGE_KEY", endpoint_model="x")
    assert stub.requests == []


# Templates


@pytest.mark.parametrize("name", NAMES)
def test_a_named_template_shows_prompt_and_texts_as_they_are(name):
    from stages.judge.contract import Question

    texts = ("one {second} \\1", "two {prompt}")
    messages = JudgeTemplate.of(name).messages(Question("What? {first}", texts))
    assert all(text in messages[-1]["content"] for text in (*texts, "What? {first}"))


@pytest.mark.parametrize(
    ("name", "reply", "value"),
    [
        ("mt-bench", "B is short. Verdict: [[A]]", 1.0),
        ("mt-bench", "[[B]] it is, so [[B]]", 0.0),
        ("mt-bench", "[[C]]", 0.5),
        ("mt-bench", "<think>maybe [[A]]</think>[[B]]", 0.0),
        ("mt-bench", "[[A]] [[C]]", None),
        ("alpaca-eval", "m", 1.0),
        ("alpaca-eval", " M.\n", 0.0),
        ("alpaca-eval", "The model M is better", None),
    ],
)
def test_verdicts_of_the_named_templates(name, reply, value):
    assert JudgeTemplate.of(name).verdict(reply) == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user: '{prompt} {first}'\nverdicts: {first: a, second: b}", r"user lacks \{second\}"),
        (
            "user: '{prompt} {first} {second}'\nverdicts: {first: a}",
            "expected a regular expression for first, second",
        ),
        (
            "user: '{prompt} {first} {second}'\nverdicts: {first: '(', second: b}",
            "verdicts.first is no regular",
        ),
        ("user: '{prompt} {first} {second}'\nother: 1\nverdicts: {first: a, second: b}", "unknown key other"),
        ("- a", "expected the keys"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_wrong_template_is_named(tmp_path, content, message):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        JudgeTemplate.of(str(path))


def test_a_template_that_is_not_there_is_named():
    with pytest.raises(AlignError, match="neither a file nor one of alpaca-eval, mt-bench"):
        JudgeTemplate.of("mtbench")
