"""The small files of layouts that once failed: each comes in right, or is refused for the right reason.

In the texts, GOODn is in the better completion of row n, BADn in the worse one, CTXn and SYS in the prompt.
"""

import json
import re

import pytest

from cache.errors import DataError
from stages.data.readers import read_source
from stages.formats import Unusable, arranged, conversion, detect_format, renamed
from stages.formats.unread_columns import columns_not_read
from stages.settings.data import DataSettings, PrepareSettings


def preferences(path, **settings):
    """The format of a file, the preferences of its rows, and what the others are dropped for."""
    data = DataSettings(path=str(path), **settings)
    rows = list(read_source(data))
    mapped = list(renamed(rows, data.columns))
    format_ = detect_format(data.format, mapped)
    columns_not_read(rows, format_, data)
    convert = conversion(format_, data, PrepareSettings())
    kept, dropped = [], []
    for row in arranged(mapped, format_):
        try:
            kept.append(convert(row.value))
        except Unusable as reason:
            dropped.append(str(reason))
    return format_.name, kept, dropped


def words(value):
    """The numbered code words of a prompt or completion, without those of masked turns."""
    turns = value if isinstance(value, list) else [{"content": value}]
    found = " ".join(turn["content"] for turn in turns if turn.get("weight") != 0)
    return re.findall(r"(?:GOOD|BAD|CTX|SYS|Second [ab] )[a-z]?\d*", found)


# The format, the number of preferences and of rows dropped.
READ = {
    "all_held_out": ("unpaired", 6, []),
    "kto_one_prompt": ("unpaired", 12, []),
    "leak_train": ("preference", 20, []),
    "step_dpo": ("step_dpo", 24, []),
    "scored_rows_two_systems": ("scored_rows", 48, []),
    "scored_rows_weights": ("scored_rows", 24, []),
    "scored_rows_tools": ("scored_rows", 0, ["fewer_than_two_responses"] * 48),
    "mtbench_human": ("arena", 24, []),
    "mtbench_gpt4_pair": ("arena", 23, ["tie"]),
    "lmarena_140k": ("arena", 20, ["tie"] * 4),
    "oasst_trees": ("oasst_trees", 24, []),
    "full_hh_three_columns": ("preference", 24, []),
    "distilabel_orca": ("orca", 20, ["tie"] * 4),
    "shp_float_labels": ("shp", 24, []),
    "unpaired_float_labels": ("unpaired", 24, []),
    "trl_implicit_text": ("implicit_text", 24, []),
    # What becomes of their turns and tools is a matter of the template.
    "system_turns": ("preference", 8, []),
    "tool_result_no_role": ("preference", 6, []),
    "tool_rounds": ("preference", 4, []),
    "tools_string_arguments": ("preference", 8, []),
    "qwen_like": ("preference", 8, []),
}
REFUSED = {
    "instruction_output_list_with_scores": "the column scores is a list of numbers beside the answers",
    "rag_context_column": "the column context is not read by the format orca",
    "rag_context_prompt": "the column context is not read by the format preference",
    "vlm_images_column": "the column images has pictures or sound, and models of text alone are trained",
    "vlm_rlaif_v": "the column image has pictures or sound",
}


def test_every_case_is_named(shared_cases):
    names = {path.stem for path in (shared_cases / "rows").iterdir()}
    assert names == READ.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", READ)
def test_a_layout_comes_in_right(shared_cases, name):
    found, kept, dropped = preferences(shared_cases / "rows" / f"{name}.jsonl")
    assert (found, len(kept), dropped) == READ[name]
    for preference in kept:
        for candidate in preference.candidates:
            side = "GOOD" if candidate.role in ("chosen", "desirable") else "BAD"
            others = {"GOOD", "BAD"} - {side}
            assert not any(word.startswith(tuple(others)) for word in words(candidate.completion))


@pytest.mark.parametrize("name", REFUSED)
def test_a_layout_is_refused_for_its_reason(shared_cases, name):
    with pytest.raises(DataError, match=REFUSED[name]):
        preferences(shared_cases / "rows" / f"{name}.jsonl")


def test_what_makes_the_prompt_is_in_it(shared_cases):
    _, kept, _ = preferences(shared_cases / "rows" / "step_dpo.jsonl")
    assert [words(row.prompt) for row in kept] == [[f"CTX{n}", f"CTX2{n}"] for n in range(24)]
    _, kept, _ = preferences(shared_cases / "rows" / "full_hh_three_columns.jsonl")
    assert all([turn["role"] for turn in row.prompt] == ["user", "assistant", "user"] for row in kept)
    assert [words(row.prompt) for row in kept] == [[f"CTXa{n}", f"CTX{n}"] for n in range(24)]


def test_rows_of_other_system_texts_are_other_prompts(shared_cases):
    _, kept, _ = preferences(shared_cases / "rows" / "scored_rows_two_systems.jsonl")
    for row in kept:
        person = row.prompt[0]["content"][-2]
        assert [side.completion[0]["content"].split()[-1] for side in row.candidates] == [person, person]


def test_each_answer_has_the_weight_of_its_row(shared_cases):
    _, kept, _ = preferences(shared_cases / "rows" / "scored_rows_weights.jsonl")
    rows = [json.loads(line) for line in (shared_cases / "rows" / "scored_rows_weights.jsonl").open()]
    weights = {row["response"]: row["weight"] for row in rows}
    assert {side.completion: side.weight for row in kept for side in row.candidates} == weights


def test_of_a_judged_turn_nothing_else_is_trained(shared_cases):
    path = shared_cases / "rows" / "mtbench_human.jsonl"
    rows = [json.loads(line) for line in path.open()]
    _, kept, _ = preferences(path)
    for number, (row, preference) in enumerate(zip(rows, kept, strict=True)):
        sides = {"a": row["conversation_a"], "b": row["conversation_b"]}
        best = sides["a" if row["winner"] == "model_a" else "b"]
        trained = [turn for turn in preference.candidates[0].completion if turn.get("weight") != 0]
        assert [turn["content"] for turn in trained if turn["role"] == "assistant"] == [
            best[2 * row["turn"] - 1]["content"]
        ]
        assert preference.prompt[0] == best[0], number


def test_a_context_is_used_by_a_text_with_columns_in_it(shared_cases):
    path = shared_cases / "rows" / "rag_context_column.jsonl"
    columns = {"prompt": "{context}\n{question}", "chosen": "chosen", "rejected": "rejected"}
    _, kept, _ = preferences(path, columns=columns)
    assert [words(row.prompt) for row in kept] == [[f"CTX2{n}", f"CTX{n}"] for n in range(24)]
    assert len(preferences(path, ignore=["context"])[1]) == 24
    with pytest.raises(DataError, match=r"data\.ignore: .* has no column contxt"):
        preferences(path, ignore=["contxt"])


def test_answers_with_scores_are_ranked_by_them(shared_cases):
    path = shared_cases / "rows" / "instruction_output_list_with_scores.jsonl"
    columns = {"prompt": "instruction", "responses": "output", "rewards": "scores"}
    _, kept, _ = preferences(path, columns=columns)
    assert [words(row.candidates[0].completion) for row in kept] == [[f"GOOD{n}"] for n in range(24)]
