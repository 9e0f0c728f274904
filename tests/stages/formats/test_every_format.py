"""Of the example rows of the formats, all about 2+2, each is read by one format, and 4 wins."""

import json

import pytest

from cache.errors import DataError, UsageError
from stages.data.readers import read_source
from stages.data.source_row import BadRow, SourceRow
from stages.formats import (
    FORMATS,
    Tokens,
    Unusable,
    arranged,
    choose_format,
    conversion,
    detect_format,
    renamed,
)
from stages.formats.group_by_prompt import gather
from stages.settings.data import DataSettings, PrepareSettings

NAMES = [entry.name for entry in FORMATS]
BY_CLASS = {entry.name: entry for entry in FORMATS}
BY_NAME = {entry.name: json.loads(entry.example) for entry in FORMATS}


def convert(row, name="auto", graded="best_worst", **data):
    format_ = choose_format(name, row, "x:1")
    return conversion(format_, DataSettings(**data), PrepareSettings(graded=graded))(row)


def said(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]


def rows(*values):
    return [SourceRow(f"x:{number}", value) for number, value in enumerate(values, start=1)]


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_known_by_its_own_format_alone(name):
    assert [entry.name for entry in FORMATS if entry.matches(BY_NAME[name])] == [name]


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("tokenized")])
def test_the_right_answer_wins(name):
    row = BY_NAME[name]
    if name in ("scored_rows", "prometheus"):
        other = json.loads(
            json.dumps(row).replace('"4"', '"5"').replace("to evaluate:\\n4", "to evaluate:\\n5")
        )
        other.update({"reward": 0.5} if name == "scored_rows" else {"gpt4_score": [1, 2, 1]})
        row = {"rows": [other, row]}
    preference = convert(row, name, **({"threshold": 3} if name == "helpsteer" else {}))
    turns = [] if isinstance(preference.prompt, str) else preference.prompt
    asked = [turn["content"] for turn in turns if turn["role"] == "user"][-1] if turns else preference.prompt
    assert "2+2" in asked
    first, *others = preference.candidates
    assert said(first.completion) == "4"
    assert first.role in ("chosen", "desirable")
    assert [(said(other.completion), other.role) for other in others] in ([], [("5", "rejected")])
    if others and first.score is not None:
        assert first.score > others[0].score


@pytest.mark.parametrize(
    ("name", "change", "swapped"),
    [
        ("arena", {"winner": "model_b"}, True),
        ("shp", {"labels": 1}, True),
        ("halos_pairwise", {"label": 1}, True),
        ("safe_rlhf_better", {"better_response_id": 0}, True),
        ("safe_rlhf_safer", {"safer_response_id": 0}, True),
        ("pandalm", {"annotator1": 2, "annotator2": 2}, True),
        ("pandalm", {"annotator1": 1, "annotator2": 0, "annotator3": 1}, False),
    ],
)
def test_a_verdict_the_other_way_swaps_the_sides(name, change, swapped):
    first = convert({**BY_NAME[name], **change}).candidates[0]
    assert said(first.completion) == ("5" if swapped else "4")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("arena", {"winner": "a"}),
        ("shp", {"labels": 2}),
        ("shp", {"labels": True}),
        ("safe_rlhf_better", {"better_response_id": "1"}),
        ("pandalm", {"annotator2": 3}),
        ("pandalm", {"response1": True}),
        ("kto_messages", {"label": "good"}),
        ("nemo_rl", {"completions": [{"completion": "4"}, {"rank": 1, "completion": "5"}]}),
        ("nectar", {"answers": ["4", "5"]}),
        ("llama_factory_ranked", {"output": ["4", 5]}),
        ("llama_factory_alpaca", {"history": ["1+1"]}),
        ("openai", {"input": "2+2?"}),
        ("openai", {"input": {"messages": [{"role": "user", "content": "2+2?"}], "tools": "{"}}),
        ("prometheus", {"instruction": "rate this"}),
        ("tokenized", {"chosen_ids": [8, -1]}),
        ("tokenized", {"chosen_mask": [1]}),
        ("halos_binary", {"output": None}),
    ],
)
def test_what_a_format_does_not_say_is_not_guessed(name, change):
    with pytest.raises(BadRow):
        convert({**BY_NAME[name], **change}, name)


TIES = [
    ("arena", {"winner": "tie"}),
    ("arena", {"winner": "tie (bothbad)"}),
    ("pandalm", {"annotator1": 1, "annotator2": 2, "annotator3": 0}),
    ("pandalm", {"annotator1": 0, "annotator2": 0}),
    ("graded", {"rewards": [1, 1, 1]}),
    ("nemo_rl", {"completions": [{"rank": 1, "completion": "4"}, {"rank": 1, "completion": "5"}]}),
]


@pytest.mark.parametrize(("name", "change"), TIES)
def test_a_tie_is_dropped_or_enters_both_ways_with_half_the_weight(name, change):
    row = {**BY_NAME[name], **change, "weight": 3.0}
    with pytest.raises(Unusable, match=r"^tie$"):
        convert(row)
    candidates = convert(row, ties="half").candidates
    assert [candidate.role for candidate in candidates] == ["chosen", "rejected"] * 2
    assert [candidate.weight for candidate in candidates] == [1.5] * 4
    first, second, again, back = (candidate.completion for candidate in candidates)
    assert (first, second) == (back, again)
    assert first != second


def test_a_question_that_only_a_person_can_answer_is_asked():
    both = {**BY_NAME["safe_rlhf_better"], "safer_response_id": 0}
    with pytest.raises(DataError, match=r"fits several formats.*safe_rlhf_better: .*safe_rlhf_safer: "):
        choose_format("auto", both, "x:1")
    with pytest.raises(UsageError, match=r"data\.threshold=SCORE"):
        convert(BY_NAME["helpsteer"])
    for threshold, role in ((4, "desirable"), (4.5, "undesirable")):
        assert convert(BY_NAME["helpsteer"], threshold=threshold).candidates[0].role == role
    with pytest.raises(UsageError, match=r"data\.threshold is for single scored responses"):
        convert(BY_NAME["preference"], threshold=3)


def test_the_first_thousand_rows_decide_together():
    pair, graded = BY_NAME["preference"], BY_NAME["graded"]
    assert (
        detect_format("auto", [SourceRow("x:1", None, "cut"), *rows(pair, {"odd": 1}, pair)]).name
        == "preference"
    )
    with pytest.raises(
        DataError, match=r"fits several formats.*preference, 2 of the first 3 rows.*graded, 1 of"
    ):
        detect_format("auto", rows(pair, pair, graded))
    assert detect_format("graded", rows(pair, graded)).name == "graded"


@pytest.mark.parametrize(
    "row",
    [{"prompt": "2+2?"}, {"turns": ["2+2?"]}, {"messages": [{"role": "user", "content": "q"}], "id": 1}],
)
def test_prompts_alone_are_for_sampling(row):
    with pytest.raises(DataError, match=r"a prompt and no answers.*sample\.prompts"):
        choose_format("auto", row, "x:1")


def test_a_column_map_reads_any_layout():
    row = {"ask": "2+2?", "answers": [{"text": "4"}, {"text": "5"}], "a.b": 9.0, "label": 1}
    columns = {"prompt": "ask", "chosen": "answers.0.text", "rejected": "answers.1.text", "margin": "a.b"}
    [found] = renamed(rows(row), columns)
    assert found.value == {"prompt": "2+2?", "chosen": "4", "rejected": "5", "margin": 9.0}
    best, worst = convert(found.value).candidates
    assert (best.completion, best.score, worst.score) == ("4", 9.0, 0.0)
    [missing] = renamed(rows({"ask": "2+2?", "answers": []}), columns)
    assert missing.value is None
    assert (missing.problem or "").startswith("answers.0.text: no such column")


def test_rows_of_one_prompt_are_gathered_wherever_they_stand():
    values = [{"prompt": prompt, "text": text, "reward": reward} for prompt, text, reward in
              [("q", "a", 1), ("p", "c", 5), ("q", "b", 2), ("p", "d", 4), ("r", "e", 0)]]  # fmt: skip
    found = list(
        gather([*rows(*values), SourceRow("x:6", None, "cut"), SourceRow("x:7", {"text": "f"})], ["prompt"])
    )
    assert [row.location for row in found] == ["x:1 and 1 more", "x:2 and 1 more", "x:5", "x:6", "x:7"]
    assert found[3].problem == "cut"
    best, worst = convert(found[0].value, "scored_rows").candidates
    assert (best.completion, best.score, worst.completion, worst.score) == ("b", 2, "a", 1)
    assert [said(c.completion) for c in convert(found[1].value, "scored_rows", "ranked").candidates] == [
        "c",
        "d",
    ]
    with pytest.raises(Unusable, match="fewer_than_two_responses"):
        convert(found[2].value, "scored_rows")


@pytest.mark.parametrize("column", ["system", "system_prompt", "tools", "chat_template_kwargs"])
def test_rows_that_differ_in_what_makes_the_prompt_are_not_gathered(column):
    tools = [[{"name": name}] for name in "ab"]
    made = tools if column == "tools" else [{"a": 1}, {"a": 2}] if column == "chat_template_kwargs" else "ab"
    values = [
        {"prompt": "q", "text": f"{number} {answer}", "reward": answer, column: value}
        for number, value in enumerate(made)
        for answer in range(2)
    ]
    found = list(arranged(rows(*values), BY_CLASS["scored_rows"]))
    assert [[row["text"] for row in one.value["rows"]] for one in found if one.value] == [
        ["0 0", "0 1"],
        ["1 0", "1 1"],
    ]


def message(role, text, *replies, **more):
    return {"role": role, "text": text, "replies": list(replies), **more}


def test_every_message_of_a_tree_with_ranked_replies_is_a_prompt():
    root = message(
        "prompter", "2+2?",
        message("assistant", "5", rank=1),
        message("assistant", "4", message(
            "prompter", "3+3?", message("assistant", "6", rank=0), message("assistant", "7", rank=1), message("assistant", "8", rank=None),
        ), message("prompter", "Sure?", message("assistant", "Yes", rank=0)), rank=0),
    )  # fmt: skip
    bare = message("prompter", "Hi", message("assistant", "Ho", rank=None))
    trees = [{"message_tree_id": "m", "prompt": tree} for tree in (root, bare, {"replies": 3})]
    found = list(arranged(rows(*trees), BY_CLASS["oasst_trees"]))
    assert [row.location for row in found] == [
        "x:1 (message 1 with ranked replies)",
        "x:1 (message 2 with ranked replies)",
        "x:2",
        "x:3",
    ]
    first, second = (convert(row.value, "oasst_trees") for row in found[:2])
    assert [said(side.completion) for side in first.candidates] == ["4", "5"]
    assert [turn["content"] for turn in second.prompt] == ["2+2?", "4", "3+3?"]
    assert [said(side.completion) for side in second.candidates] == ["6", "7"]
    with pytest.raises(Unusable, match="fewer_than_two_responses"):
        convert(found[2].value, "oasst_trees")
    assert "replies" in found[3].problem


def test_a_bedrock_row_keeps_its_arguments():
    row = {
        **BY_NAME["bedrock"],
        "chat_template_kwargs": {"enable_thinking": False},
        "system": [{"text": "S"}],
    }
    preference = convert(row, "bedrock")
    assert preference.chat_template_kwargs == {"enable_thinking": False}
    assert [turn["content"] for turn in preference.prompt] == ["S", "2+2?"]


def test_an_object_of_posts_is_read_entry_by_entry(tmp_path):
    path = tmp_path / "posts.json"
    path.write_text(
        json.dumps({"one": {"responses": ["a", "b"], "rewards": [1, 2]}, "two": {"responses": []}})
    )
    found = list(read_source(DataSettings(path=str(path))))
    assert [row.location for row in found] == ["posts.json#1", "posts.json#2"]
    assert choose_format("auto", found[0].value or {}, "x").name == "odpo"
    preference = convert(found[0].value)
    assert (preference.prompt, preference.candidates[0].completion) == ("one", "b")


def test_every_response_of_a_ranked_layout_can_be_kept():
    for name in ("llama_factory_ranked", "nemo_rl", "nectar", "on_policy_scores", "graded"):
        candidates = convert(BY_NAME[name], graded="ranked").candidates
        assert {candidate.role for candidate in candidates} == {"ranked"}
        best = max(candidates, key=lambda candidate: candidate.score)
        assert said(best.completion) == "4"
    with pytest.raises(UsageError, match=r"prepare\.graded=ranked is for graded or ranked responses"):
        convert(BY_NAME["preference"], graded="ranked")


def test_token_ids_and_their_masks_are_kept():
    preference = convert({**BY_NAME["tokenized"], "chosen_mask": [1, 0]})
    assert preference.prompt == Tokens((5, 6, 7))
    assert [candidate.completion for candidate in preference.candidates] == [
        Tokens((8, 2), (True, False)),
        Tokens((9, 2)),
    ]


USER = {"role": "user", "content": "2+2?"}
CALL = {"name": "add", "arguments": {"a": 2, "b": 2}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
RESULT = {"role": "tool", "content": "4"}
ANSWER = {"role": "assistant", "content": "It is 4."}


@pytest.mark.parametrize(
    "calling",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(CALL)}]},
    ],
)  # fmt: skip
def test_tool_calls_come_out_in_one_form_and_belong_to_the_completion(calling):
    observed = {"from": "observation", "value": "4"}
    row = {
        "messages": [USER, calling, observed, ANSWER],
        "label": True,
        "tools": json.dumps([{"name": "add"}]),
    }
    preference = convert(row)
    assert preference.prompt == [USER]
    own_id = {"id": "1"} if "1" in str(calling.get("tool_calls")) else {}
    called = {**CALLED, "tool_calls": [{**own_id, **CALLED["tool_calls"][0]}]}
    assert preference.candidates[0].completion == [called, RESULT, ANSWER]
    assert preference.tools == [{"name": "add"}]


def test_parts_reasoning_and_names_of_other_projects():
    turns = [
        {"from": "human", "value": [{"type": "text", "text": "2+"}, {"type": "text", "value": "2?"}]},
        {
            "role": "assistant",
            "content": [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "4"}],
        },
    ]
    [candidate] = convert({"messages": turns, "label": False}).candidates
    assert candidate.completion == [{"role": "assistant", "content": "4", "reasoning_content": "hm"}]


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_opens_the_conversation_unless_it_has_one(column):
    row = {**BY_NAME["preference"], column: "Be kind."}
    assert convert(row).prompt == [{"role": "system", "content": "Be kind."}, USER]
    own = {"role": "system", "content": "Be brief."}
    assert convert({**row, "prompt": [own, USER]}).prompt == [own, USER]
    assert convert({**row, column: " "}).prompt == "2+2?"


def weighted(*weights):
    contents = ["4", "sure?", "yes"]
    roles = ["assistant", "user", "assistant"]
    turns = [
        {"role": role, "content": content, "loss_weight": weight}
        for role, content, weight in zip(roles, contents, weights, strict=True)
    ]
    return {
        "chosen_messages": [USER, *turns],
        "rejected_messages": [USER, {"role": "assistant", "content": "5"}],
    }


def test_loss_weights_of_turns_become_a_mask_and_one_weight():
    first = convert(weighted(0.0, 0.0, 0.5)).candidates[0]
    assert first.weight == 0.5
    assert [turn.get("weight") for turn in first.completion] == [0.0, None, 0.5]
    assert convert({**weighted(1.0, 0.0, 1.0), "weight": 2}).candidates[0].weight == 2
    with pytest.raises(BadRow, match=r"weights 0\.5, 1\.0; expected 0 or one weight"):
        convert(weighted(0.5, 0.0, 1.0))
    with pytest.raises(BadRow, match="only assistant turns are trained"):
        convert(weighted(1.0, 1.0, 1.0))
    with pytest.raises(BadRow, match="at least 0"):
        convert(weighted(-1.0, 0.0, 1.0))


def test_the_weight_of_a_row():
    assert [c.weight for c in convert({**BY_NAME["preference"], "weight": 0.25}).candidates] == [0.25, 0.25]
    with pytest.raises(Unusable, match="weight_zero"):
        convert({**BY_NAME["preference"], "weight": 0})
    with pytest.raises(BadRow, match="weight: expected a finite number"):
        convert({**BY_NAME["preference"], "weight": "1"})
