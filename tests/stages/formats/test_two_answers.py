"""Two answers and a verdict in any words, labels as people write them, and paths and texts of a column map."""

import json

import pytest

from cache.errors import DataError, UsageError
from stages.data.source_row import BadRow, SourceRow
from stages.formats import FORMATS, Unusable, conversion, detect_format, renamed
from stages.formats.labels import labels_of
from stages.formats.positions import refuse_sides_by_position
from stages.formats.two_answers import Bedrock
from stages.settings.data import DataSettings, PrepareSettings

EXAMPLES = {entry.name: json.loads(entry.example) for entry in FORMATS}


def outcomes(*rows, **settings):
    """What each row becomes: (chosen, rejected, score of the chosen), its role, or why it is dropped."""
    data = DataSettings(**settings)
    head = list(renamed([SourceRow(f"x:{n}", row) for n, row in enumerate(rows, 1)], data.columns))
    assert not [row.problem for row in head if row.problem]
    format_ = detect_format(data.format, head)
    convert = conversion(format_, data, PrepareSettings(), head)
    found = []
    for row in head:
        try:
            sides = convert(row.value).candidates
        except Unusable as reason:
            found.append(str(reason))
            continue
        said = [s.completion if isinstance(s.completion, str) else s.completion[-1]["content"] for s in sides]
        found.append((*said, sides[0].score) if len(sides) == 2 else sides[0].role)
    return found


def judged(*verdicts, **settings):
    return outcomes(*({"prompt": "q", "a": "x", "b": "y", "verdict": v} for v in verdicts), **settings)


A, B = ("x", "y", None), ("y", "x", None)


def test_words_of_one_meaning_need_no_map():
    assert judged("A>B", "model_a", " a ", "A>>B", "response_A") == [A] * 5
    assert judged("b", "B>A", "MODEL_B", "[[B]]") == [B] * 4
    assert (
        judged("tie", "tie (inconsistent)", "both_bad", "A=B", None, "") == ["tie"] * 4 + ["no_verdict"] * 2
    )


def test_numbers_need_one_and_keep_their_size_where_they_are_compared():
    with pytest.raises(BadRow, match=r"verdict: .*data\.labels"):
        judged(1)
    assert judged(1, 2.0, "1.0", labels={"1": "a", "2": "b"}) == [A, B, A]
    ordinal = {"<0": "a", ">0": "b", "0": "tie", "99": None}
    assert judged(-3, 1, 0, 99, None, labels=ordinal) == [
        ("x", "y", 3.0), ("y", "x", 1.0), "tie", "no_verdict", "no_verdict"
    ]  # fmt: skip
    with pytest.raises(UsageError, match="up is none of a or b or tie"):
        judged("up", labels={"up": True})


def test_a_third_candidate_of_bedrock_is_refused_and_not_left_out():
    good, bad = (
        {"content": [{"text": text}], "preferenceLabel": label}
        for text, label in (("4", "preferred"), ("5", "non-preferred"))
    )
    row = {
        "messages": [
            {"role": "user", "content": [{"text": "2+2?"}]},
            {"role": "assistant", "candidates": [good, bad]},
        ]
    }
    assert Bedrock.convert(row).candidates[0].completion[0]["content"] == "4"
    row["messages"][-1]["candidates"].insert(0, {**good, "content": [{"text": "four"}]})
    with pytest.raises(BadRow, match="one that is preferred and one that is non-preferred"):
        Bedrock.convert(row)


def test_scores_decide_and_are_kept():
    rows = [
        {"prompt": "q", "a": "x", "b": "y", "score_a": s, "score_b": t}
        for s, t in [(1, 3), (2, 2), (5, None)]
    ]
    assert outcomes(*rows) == [("y", "x", 3.0), "tie", "no_verdict"]


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("helpsteer2", {"preference_strength": 3}, ("5", "4", 3.0)),
        ("helpsteer3", {"overall_preference": 0}, "tie"),
        ("llmbar", {"label": 1}, ("5", "4", None)),
        ("judgebench", {"label": "B>A"}, ("5", "4", None)),
        ("multipref", {"overall_pref": "B-is-slightly-better"}, ("5", "4", None)),
        ("multipref", {"overall_pref": "Tie"}, "tie"),
        ("alpaca_eval", {"preference": 1.0}, ("5", "4", None)),
        ("alpaca_eval", {"preference": 1.5}, "tie"),
        ("alpaca_eval", {"preference": None}, "no_verdict"),
        ("webgpt", {"score_0": 0.5, "score_1": -0.5}, ("5", "4", 0.5)),
        ("webgpt", {"score_0": 0.0, "score_1": 0.0}, "tie"),
        ("arena_lists", {"winner_model_b": 0, "winner_tie": 1}, "tie"),
        ("arena_lists", {"winner_model_b": 0, "winner_model_a": 1}, ("5", "4", None)),
    ],
)
def test_a_verdict_the_other_way(name, change, expected):
    assert outcomes({**EXAMPLES[name], **change}) == [expected]


def labelled(*labels, **settings):
    return outcomes(*({"prompt": "q", "completion": "x", "label": label} for label in labels), **settings)


GOOD, BAD = "desirable", "undesirable"


@pytest.mark.parametrize(
    ("good", "bad"),
    [("up", "down"), ("UP", "Down "), ("good", "bad"), ("Yes", "no"), (1, -1), (1.0, -1.0), ("1", "0"),
     ("👍", "👎"), ("👍\ufe0f", "👎\ufe0f"), ("TRUE", "FALSE"), ("1.0", "0.0")],
)  # fmt: skip
def test_labels_as_people_write_them(good, bad):
    assert labelled(good, bad, None, good) == [GOOD, BAD, "no_label", GOOD]
    rows = [SourceRow("x:1", {"prompt": "q", "completion": "x", "label": label}) for label in (good, bad)]
    unpaired = next(entry for entry in FORMATS if entry.name == "unpaired")
    assert labels_of(unpaired, rows, DataSettings())[1].startswith("label: ")


@pytest.mark.parametrize("labels", [(1, 0, -1), ("up", "bad"), (0.2, 0.9), ("5", "1"), ("fine",)])
def test_a_label_that_is_not_plain_is_asked_for(labels):
    with pytest.raises(DataError, match=r"label has values whose meaning is not plain.*data\.labels"):
        labelled(*labels)
    if labels != (0.2, 0.9):
        return
    assert labelled(*labels, threshold=0.5) == [BAD, GOOD]
    assert labelled(*labels, labels={">=0.5": True, "<0.5": False}) == [BAD, GOOD]


def test_a_map_says_which_labels_are_good_and_which_rows_are_left_out():
    assert labelled("ok", "meh", "no", labels={"ok": True, "no": False, "meh": None}) == [
        GOOD,
        "no_label",
        BAD,
    ]
    with pytest.raises(BadRow, match="label: expected one of ok"):
        labelled("ok", "maybe", labels={"ok": True})


def mapped(row, **columns):
    [found] = renamed([SourceRow("x:1", row)], columns)
    return found.value or found.problem


def test_paths_go_into_lists_and_json_texts_and_texts_hold_columns():
    row = {
        "q": "2+2?",
        "c": "a sum",
        "n": None,
        "out": json.dumps([{"t": "4", "s": 9}, {"t": "5", "s": 1}]),
        "k": 3,
    }
    assert mapped(row, prompt="{c}\n{q}{n}", responses="out[*].t", rewards="out[*].s") == {
        "prompt": "a sum\n2+2?", "responses": ["4", "5"], "rewards": [9, 1]
    }  # fmt: skip
    assert mapped(row, chosen="out.0.t", rejected="out[1].t") == {"chosen": "4", "rejected": "5"}
    assert "out[*].x: no such column" in mapped(row, rewards="out[*].x")
    assert "k: expected text, found 3" in mapped(row, prompt="{k}")
    assert "q: expected JSON" in mapped(row, prompt="q.0")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"r": [{"t": "a", "score": s}, {"t": "b", "score": 2}]} for s in (1, 3)],
            r'rewards: "r\[\*\]\.score"',
        ),
        ([{"r": [{"t": "a", "rank": s}, {"t": "b", "rank": 2}]} for s in (1, 3)], r'ranks: "r\[\*\]\.rank"'),
        ([{"r": [{"t": "a"}, {"t": "b"}], "scores": s} for s in ([1, 2], [2, 1])], 'rewards: "scores"'),
        (
            [{"r": [{"t": "a"}, {"t": "b"}], "winner": s} for s in "ab"],
            r"a: r\.0\.t, b: r\.1\.t, verdict: winner",
        ),
    ],
)
def test_a_side_is_not_taken_by_its_place_where_the_better_one_alternates(rows, said):
    data = DataSettings(columns={"prompt": "q", "chosen": "r.0.t", "rejected": "r.1.t"})
    head = [SourceRow(f"x:{n}", {"q": "?", **row}) for n, row in enumerate(rows, 1)]
    with pytest.raises(DataError, match=f"by its place.*{said}"):
        refuse_sides_by_position(head, data)
    refuse_sides_by_position(head[:1], data)


def test_a_verdict_column_that_is_to_be_ignored_stops_nothing():
    head = [
        SourceRow(f"x:{n}", {"q": "?", "r": [{"t": "a"}, {"t": "b"}], "winner": w})
        for n, w in enumerate("ab")
    ]
    columns = {"prompt": "q", "chosen": "r.0.t", "rejected": "r.1.t"}
    with pytest.raises(DataError, match=r"or name it in data\.ignore"):
        refuse_sides_by_position(head, DataSettings(columns=columns))
    refuse_sides_by_position(head, DataSettings(columns=columns, ignore=["winner"]))


def test_labels_that_are_all_empty_are_not_guessed():
    data = DataSettings(path="x.jsonl")
    rows = [SourceRow("x:1", {"prompt": "q", "completion": "a", "label": ""})]
    assert labels_of(detect_format("unpaired", rows), rows, data) == ({}, "")
