"""Every layout of preference data: what a row becomes, and what is said of one that is malformed."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import DataError
from stages.data.messages import messages
from stages.data.source_row import BadRow
from stages.formats import FORMATS, Unusable, choose_format, conversion
from stages.settings.data import DataSettings, PrepareSettings

BY_NAME = {entry.name: entry for entry in FORMATS}


def convert(row, name="auto", graded="best_worst", **data):
    """The preference of a row under the settings' policies."""
    format_ = choose_format(name, row, "x:1")
    return conversion(format_, DataSettings(**data), PrepareSettings(graded=graded))(row)


def turns(*contents, first="user", **aliases):
    """Messages that alternate between user and assistant."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [
        {"role": aliases.get(roles[n % 2], roles[n % 2]), "content": text} for n, text in enumerate(contents)
    ]


def user(text):
    return turns(text)


def assistant(text):
    return turns(text, first="assistant")


SYSTEM = [{"role": "system", "content": "s"}]
Q, A, B = user("q"), assistant("a"), assistant("b")
TRANSCRIPT = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"

# name: (format, row, prompt, [(completion, role, score)])
GOOD = {
    "text": ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, "q", ["a", "b"]),
    "messages": ("preference", {"prompt": SYSTEM + Q, "chosen": A, "rejected": B}, SYSTEM + Q, [A, B]),
    "prompt text, completions messages": (
        "preference",
        {"prompt": "q", "chosen": A, "rejected": B},
        Q,
        [A, B],
    ),
    "prompt messages, completions text": (
        "preference",
        {"prompt": Q, "chosen": "a", "rejected": "b"},
        Q,
        [A, B],
    ),
    "several turns in a completion": (
        "preference",
        {"prompt": Q, "chosen": turns("a", "and?", "a2", first="assistant"), "rejected": B},
        Q,
        [turns("a", "and?", "a2", first="assistant"), B],
    ),
    "roles of other projects": (
        "preference",
        {
            "prompt": [{"role": "developer", "content": "s"}, {"role": "human", "content": "q"}],
            "chosen": turns("a", first="assistant", assistant="gpt"),
            "rejected": turns("b", first="assistant", assistant="gpt"),
        },
        SYSTEM + Q,
        [A, B],
    ),
    "keys that no template reads": (
        "preference",
        {
            "prompt": [{**Q[0], "id": 7, "date": None}],
            "chosen": [{**A[0], "weight": 1.0, "tool_calls": None}],
            "rejected": [{**B[0], "name": "bot", "reasoning_content": "hm"}],
        },
        Q,
        [A, [{**B[0], "name": "bot", "reasoning_content": "hm"}]],
    ),
    "ultrafeedback does not double the prompt": (
        "ultrafeedback",
        {"prompt": "q", "chosen": Q + A, "rejected": Q + B, "messages": Q + A},
        Q,
        [A, B],
    ),
    "ultrafeedback with a system turn": (
        "ultrafeedback",
        {"prompt": " q\n", "chosen": SYSTEM + Q + A, "rejected": SYSTEM + Q + B},
        SYSTEM + Q,
        [A, B],
    ),
    "implicit": ("implicit", {"chosen": Q + A, "rejected": Q + B}, Q, [A, B]),
    "implicit, differing in the last of several turns": (
        "implicit",
        {"chosen": turns("q", "x", "y", "a"), "rejected": turns("q", "x", "y", "b")},
        turns("q", "x", "y"),
        [A, B],
    ),
    "implicit, differing in a user turn, so from the assistant turn before it": (
        "implicit",
        {"chosen": turns("q", "x", "y", "a"), "rejected": turns("q", "x", "z", "a")},
        Q,
        [turns("x", "y", "a", first="assistant"), turns("x", "z", "a", first="assistant")],
    ),
    "implicit, one conversation goes on after the other": (
        "implicit",
        {"chosen": turns("q", "a"), "rejected": turns("q", "a", "y", "z")},
        Q,
        [A, turns("a", "y", "z", first="assistant")],
    ),
    "transcript": (
        "hh",
        {"chosen": TRANSCRIPT + " a", "rejected": TRANSCRIPT + " b\n\nof two paragraphs: x"},
        turns("one", "two", "three"),
        [A, assistant("b\n\nof two paragraphs: x")],
    ),
    "desirable": ("unpaired", {"prompt": "q", "completion": "a", "label": True}, "q", ["a"]),
    "undesirable, as 0": ("unpaired", {"prompt": Q, "completion": A, "label": 0}, Q, [A]),
    "unpaired, mixed": ("unpaired", {"prompt": "q", "completion": A, "label": 1}, Q, [A]),
    "graded": (
        "graded",
        {"prompt": "q", "responses": ["c", "a", "d", "b"], "rewards": [2, 3.5, 2, -1]},
        "q",
        ["a", "b"],
    ),
    "graded, first of equals": (
        "graded",
        {"prompt": "q", "responses": ["a", "x", "b"], "rewards": [1, 1, 0]},
        "q",
        ["a", "b"],
    ),
    "graded messages": ("graded", {"prompt": Q, "responses": ["a", "b"], "rewards": [1, 0]}, Q, [A, B]),
}


@pytest.mark.parametrize("case", GOOD)
def test_a_row_becomes_its_preference(case):
    name, row, prompt, completions = GOOD[case]
    preference = convert(row)
    assert choose_format("auto", row, "x:1").name == name
    assert preference.prompt == prompt
    assert [candidate.completion for candidate in preference.candidates] == completions


@pytest.mark.parametrize(
    ("row", "roles", "scores"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ["chosen", "rejected"], [None, None]),
        (
            {"chosen": Q + A, "rejected": Q + B, "prompt": "q", "score_chosen": 8, "score_rejected": 2.5},
            ["chosen", "rejected"],
            [8.0, 2.5],
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "chosen-rating": 4.0, "rejected-rating": None},
            ["chosen", "rejected"],
            [None, None],
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": 1, "rejected_score": 0},
            ["chosen", "rejected"],
            [1, 0],
        ),
        ({"prompt": "q", "responses": ["b", "a"], "rewards": [-1, 3]}, ["chosen", "rejected"], [3.0, -1.0]),
        ({"prompt": "q", "completion": "a", "label": True}, ["desirable"], [None]),
        ({"prompt": "q", "completion": "a", "label": False}, ["undesirable"], [None]),
    ],
)
def test_roles_and_scores(row, roles, scores):
    candidates = convert(row).candidates
    assert [candidate.role for candidate in candidates] == roles
    assert [candidate.score for candidate in candidates] == scores


UNUSABLE = {
    "same text": ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "identical_completions"),
    "same conversation": ("implicit", {"chosen": Q + A, "rejected": Q + A}, "identical_completions"),
    "other questions": ("implicit", {"chosen": Q + A, "rejected": user("p") + A}, "prompts_differ"),
    "other system turns": ("implicit", {"chosen": SYSTEM + Q + A, "rejected": Q + A}, "prompts_differ"),
    "other transcripts": (
        "hh",
        {"chosen": TRANSCRIPT + " a", "rejected": "\n\nHuman: one\n\nAssistant: a"},
        "prompts_differ",
    ),
    "a tie": ("graded", {"prompt": "q", "responses": ["a", "b"], "rewards": [1, 1]}, "tie"),
    "one response": (
        "graded",
        {"prompt": "q", "responses": ["a"], "rewards": [1]},
        "fewer_than_two_responses",
    ),
    "no response": ("graded", {"prompt": "q", "responses": [], "rewards": []}, "fewer_than_two_responses"),
    "best and worst of one text": (
        "graded",
        {"prompt": "q", "responses": ["a", "a"], "rewards": [1, 0]},
        "identical_completions",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_row_without_a_preference_says_which_reason_it_counts_under(case):
    name, row, reason = UNUSABLE[case]
    with pytest.raises(Unusable, match=f"^{reason}$"):
        convert(row, name)


BAD = [
    ("preference", {"prompt": "q", "chosen": "a"}, "rejected: expected text, found None"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": 7}, "rejected: expected text, found 7"),
    ("preference", {"prompt": None, "chosen": "a", "rejected": "b"}, "prompt: expected text, found None"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": B}, "one is text and the other is messages"),
    ("preference", {"prompt": "q\ud800", "chosen": "a", "rejected": "b"}, "character 1 is half a surrogate pair"),
    ("preference", {"prompt": [], "chosen": A, "rejected": B}, "prompt: expected a non-empty list"),
    ("preference", {"prompt": ["q"], "chosen": A, "rejected": B}, "prompt[0]: expected an object with role and content"),
    ("preference", {"prompt": [{"role": "user"}], "chosen": A, "rejected": B}, "prompt[0]: expected an object"),
    ("preference", {"prompt": [{"role": "alien", "content": "q"}], "chosen": A, "rejected": B}, "prompt[0].role: expected"),
    ("preference", {"prompt": [{"role": ["user"], "content": "q"}], "chosen": A, "rejected": B}, "prompt[0].role: expected"),
    ("preference", {"prompt": [{"role": None, "content": "q"}], "chosen": A, "rejected": B}, "prompt[0].role: expected"),
    (
        "preference",
        {"prompt": Q, "chosen": [{"role": "assistant", "content": None}], "rejected": B},
        "chosen[0].content: expected text, found None",
    ),
    (
        "preference",
        {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "chosen": A, "rejected": B},
        "prompt[0].content[0]: expected a part of type text, reasoning, tool_call, found {'type'",
    ),
    ("preference", {"prompt": A, "chosen": A, "rejected": B}, "prompt: expected a turn of a user in the prompt, found assistant turns alone"),
    # The first row of a file decides its layout, so a later row may repeat the prompt.
    ("preference", {"prompt": "q", "chosen": Q + A, "rejected": Q + B}, "chosen: expected a completion that begins with an assistant turn, found a user turn"),
    ("preference", {"prompt": Q, "chosen": A + Q, "rejected": B}, "chosen: expected a completion that ends with an assistant turn"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": float("nan"), "score_rejected": 0}, "score_chosen: expected a finite number"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": "2"}, "score_rejected: expected a finite number"),
    ("ultrafeedback", {"chosen": Q + A, "rejected": Q + B}, "prompt: expected text, found None"),
    ("ultrafeedback", {"prompt": "other", "chosen": Q + A, "rejected": Q + B}, "prompt: the conversations in chosen and rejected do not contain it"),
    ("implicit", {"chosen": "text", "rejected": Q + B}, "chosen: expected a non-empty list of messages, found 'text'"),
    ("implicit", {"chosen": turns("q", "a", "z"), "rejected": Q + B}, "chosen: expected a completion that ends with an assistant turn"),
    ("hh", {"chosen": "no turns", "rejected": TRANSCRIPT}, "chosen: expected a transcript from"),
    ("hh", {"chosen": TRANSCRIPT, "rejected": TRANSCRIPT + " a\n\nHuman: why"}, "rejected: expected a transcript"),
    ("hh", {"chosen": "x" + TRANSCRIPT, "rejected": TRANSCRIPT}, "chosen: expected a transcript"),
    ("hh", {"chosen": Q + A, "rejected": TRANSCRIPT}, "chosen: expected text"),
    ("unpaired", {"prompt": "q", "completion": "a"}, "label: expected true or false, found None"),
    ("unpaired", {"prompt": "q", "completion": "a", "label": "true"}, "label: expected true or false, found 'true'"),
    ("unpaired", {"prompt": "q", "completion": "a", "label": 2}, "label: expected true or false, found 2"),
    ("graded", {"prompt": "q", "responses": ["a", "b"]}, "rewards: expected a list, found None"),
    ("graded", {"prompt": "q", "rewards": [1, 2]}, "responses: expected a list, found None"),
    ("graded", {"prompt": "q", "responses": ["a", "b"], "rewards": [1]}, "lists of equal length"),
    ("graded", {"prompt": "q", "responses": ["a", "b"], "rewards": [1, "2"]}, "rewards: expected a finite number, found '2'"),
    ("graded", {"prompt": "q", "responses": ["a", "b"], "rewards": [True, 2]}, "rewards: expected a finite number, found True"),
    ("graded", {"prompt": "q", "responses": ["a", "b"], "rewards": [float("nan"), 2]}, "rewards: expected a finite number"),
    ("graded", {"prompt": "q", "responses": ["a", "b"], "rewards": [10**400, 2]}, "rewards: expected a finite number"),
    ("graded", {"prompt": "q", "responses": ["a", True], "rewards": [1, 2]}, "responses: expected text, found True"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "row", "problem"), BAD, ids=[f"{name}: {problem[:40]}" for name, _, problem in BAD]
)
def test_a_malformed_row_is_named_with_column_and_value(name, row, problem):
    with pytest.raises(BadRow) as caught:
        BY_NAME[name].convert(row)
    assert problem in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_hostile_value_is_shown_escaped_and_cut():
    with pytest.raises(BadRow) as caught:
        messages({"prompt": {"a\u202e\x00": "x" * 10_000}}, "prompt")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "gpt"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "name"]) | st.text(max_size=2), inner, max_size=3
        )
    ),
    max_leaves=10,
)
columns = st.sampled_from(
    ["prompt", "chosen", "rejected", "completion", "label", "responses", "rewards", "score_chosen"]
)


@pytest.mark.slow
@given(st.dictionaries(columns, json_values), st.sampled_from(FORMATS))
def test_any_row_is_a_preference_or_a_reason(row, format_):
    try:
        assert format_.convert(row).candidates
    except (BadRow, Unusable) as reason:
        assert str(reason)  # noqa: PT017


@pytest.mark.slow
@given(st.dictionaries(columns, json_values))
def test_any_first_row_finds_its_format_or_is_refused(row):
    try:
        assert choose_format("auto", row, "x:1").matches(row)
    except DataError as error:
        assert "x:1: a row with columns" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"query": 1, "answer": 2},
            "answer, query fits no known format. Map the columns in YAML, for example",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejcted": "b"},
            "fits no known format; rejcted is near to rejected of the format preference. Rename it, or map the columns in YAML, data.columns: {rejected: rejcted, prompt: prompt, chosen: chosen}",
        ),
        (
            {"query": "Why is it so?", "chosen": "a b", "rejected": "c d"},
            "By the names of its columns this map fits: in YAML, data.columns: {prompt: query, chosen: chosen, rejected: rejected}.",
        ),
        (
            {"line": "Why is it so?", "chosen": "a b", "rejected": "c d"},
            "has no prompt column, and chosen and rejected do not begin alike. Map it in YAML, data.columns: {prompt: line,",
        ),
        (
            {"prompt": "q", "outputs": [{"text": "a", "rating": 5}, {"text": "b", "rating": 1}]},
            'has its answers nested in outputs. Map them in YAML, data.columns: {prompt: prompt, responses: "outputs[*].text", rewards: "outputs[*].rating"}',
        ),
        (
            {f"column {number}": 1 for number in range(100)},
            "column 18, column 19 and 88 more fits no known format",
        ),
    ],
)
def test_an_unknown_layout_is_told_what_is_nearest(row, said):
    with pytest.raises(DataError) as caught:
        choose_format("auto", row, "x:1")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_layout_that_fits_two_formats_is_not_guessed():
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "completion": "c", "label": True}
    with pytest.raises(DataError, match=r"fits several formats.*preference: .*unpaired: "):
        choose_format("auto", row, "x:1")
    assert choose_format("unpaired", row, "x:1").name == "unpaired"


def test_an_unknown_format_name_lists_the_known_ones():
    with pytest.raises(
        DataError, match=r"Unknown data\.format 'dpo'\. Known formats: preference, ultrafeedback"
    ):
        choose_format("dpo", {}, "x:1")


@pytest.mark.slow
def test_hh_rlhf_itself(shared_data):
    """5 of its pairs share no prompt; every other has one that ends with a person's turn."""
    with gzip.open(shared_data / "pairs" / "hh_harmless_base_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    differing = 0
    for row in rows:
        try:
            preference = convert(row)
        except Unusable as reason:
            assert str(reason) == "prompts_differ"  # noqa: PT017
            differing += 1
            continue
        assert preference.prompt[-1]["role"] == "user"
    assert (len(rows), differing) == (2312, 5)
