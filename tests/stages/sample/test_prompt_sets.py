"""The files of evaluation tools, with the keys and values their readers look for."""

import json
from typing import Any

import pytest

from stages.generation.completion_files import CompletionRecord
from stages.sample.prompt_sets import PROMPT_SETS, AlpacaEval, ArenaHard, IFEval, MTBench, PromptSet, set_of

ALPACA = {"instruction": "Hi?\n", "output": "Hello", "generator": "davinci", "dataset": "helpful_base"}
MT = {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]}
OLD_ARENA = {"question_id": "a1", "category": "arena-hard-v0.1", "turns": [{"content": "Sort."}]}
ARENA = {"uid": "2e", "category": "hard_prompt", "subcategory": "coding", "prompt": "Sort."}
IF = {"key": 1000, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


def record(row: dict[str, Any], kind: type[PromptSet], text: str, turn=1, sample=0, prompt=None):
    keys = {key: row[key] for key in kind.keys if key in row}
    asked = prompt or [{"role": "user", "content": row.get("instruction") or row.get("prompt") or "Write."}]
    return CompletionRecord(str(row)[:30], asked, text, turn, sample, 7, "stop", 3, "tiny-dpo", keys)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (ALPACA, AlpacaEval),
        (MT, MTBench),
        (OLD_ARENA, MTBench),
        (ARENA, ArenaHard),
        (IF, IFEval),
        ({"prompt": "Hi"}, PromptSet),
        ({"instruction": "Hi", "chosen": "a", "rejected": "b", "dataset": "x"}, PromptSet),
        ({"prompt": "Hi", "category": "x", "question_id": 3}, PromptSet),
    ],
)
def test_a_set_is_recognised_by_its_columns(row, kind):
    assert set_of(row) is kind


def test_the_sets_of_real_files(shared_data):
    for name, kind in (
        ("mt_bench_question", MTBench),
        ("vicuna_bench_question", MTBench),
        ("ifeval_input_data", IFEval),
    ):
        lines = (shared_data / "eval" / f"{name}.jsonl").read_text().splitlines()
        assert {set_of(json.loads(line)) for line in lines} == {kind}


def test_alpaca_eval_has_one_output_for_each_instruction_byte_for_byte(tmp_path):
    own = [record(ALPACA, AlpacaEval, "Zwölf \u2028 Uhr", sample=sample) for sample in (0, 1)]
    AlpacaEval.write(own, tmp_path)
    assert json.loads((tmp_path / "alpaca_eval.json").read_text(encoding="utf-8")) == [
        {
            "instruction": "Hi?\n",
            "output": "Zwölf \u2028 Uhr",
            "generator": "tiny-dpo",
            "dataset": "helpful_base",
        }
    ]


def test_mt_bench_has_the_turns_of_each_sample_together(tmp_path):
    own = [
        record(MT, MTBench, f"{turn} {sample}", turn=turn, sample=sample)
        for sample in (0, 1)
        for turn in (1, 2)
    ]
    MTBench.write(own, tmp_path)
    [line] = (tmp_path / "model_answer" / "tiny-dpo.jsonl").read_text().splitlines()
    answer = json.loads(line)
    assert answer.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert (answer["question_id"], answer["model_id"]) == (81, "tiny-dpo")
    assert answer["choices"] == [
        {"index": 0, "turns": ["1 0", "2 0"]},
        {"index": 1, "turns": ["1 1", "2 1"]},
    ]


@pytest.mark.parametrize(
    ("row", "temperature"),
    [
        (MT, 0.7),
        (MT | {"category": "math"}, 0.0),
        (MT | {"category": "stem"}, 0.1),
        (MT | {"category": "generic"}, None),
        (MT | {"category": "math", "required_temperature": 0.3}, 0.3),
        (ARENA, None),
    ],
)
def test_the_temperature_is_that_of_the_category(row, temperature):
    assert set_of(row).temperature(row) == temperature


def test_the_later_turns_are_asked_later():
    assert MTBench.next_turns(MT) == ("Again.",)
    assert MTBench.next_turns(OLD_ARENA) == ()


def test_arena_hard_has_the_answer_where_its_judge_reads_it(tmp_path):
    ArenaHard.write([record(ARENA, ArenaHard, "sorted()")], tmp_path)
    [line] = (tmp_path / "model_answer" / "tiny-dpo.jsonl").read_text().splitlines()
    answer = json.loads(line)
    assert (answer["uid"], answer["model"]) == ("2e", "tiny-dpo")
    assert answer["messages"][0] == {"role": "user", "content": "Sort."}
    assert answer["messages"][-1]["content"]["answer"] == "sorted()"


def test_ifeval_calls_it_a_response(tmp_path):
    IFEval.write([record(IF, IFEval, "Fine")], tmp_path)
    [line] = (tmp_path / "ifeval.jsonl").read_text().splitlines()
    assert json.loads(line) == {"key": 1000, "prompt": "No commas.", "response": "Fine"}


def test_every_set_writes_nothing_but_files_of_its_tool(tmp_path):
    rows = {AlpacaEval: ALPACA, MTBench: MT, ArenaHard: ARENA, IFEval: IF, PromptSet: {"prompt": "Hi"}}
    for kind in PROMPT_SETS:
        folder = tmp_path / kind.__name__
        folder.mkdir()
        kind.write([record(rows[kind], kind, "a")], folder)
        assert len([path for path in folder.rglob("*") if path.is_file()]) == 1
