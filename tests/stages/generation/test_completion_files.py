"""The files of stage 4, as their readers see them."""

import json
from dataclasses import asdict

import pytest

from cache.errors import DataError
from stages.generation.completion_files import (
    CompletionRecord,
    instruction,
    read_jsonl,
    write_alpaca_eval,
    write_jsonl,
)

CHAT = [{"role": "user", "content": "Wie spät ist es?\n"}]


def record(sample_index: int = 0, model: str = "tiny-dpo", prompt=CHAT) -> CompletionRecord:
    return CompletionRecord(
        "row-1", prompt, "Zwölf \u2028 Uhr", sample_index, 2**53 - 1, "stop", 4, model, "policy"
    )


def test_jsonl_has_one_object_per_line(tmp_path):
    path = tmp_path / "completions.jsonl"
    write_jsonl([record(0), record(1)], path)
    with open(path, encoding="utf-8", newline="\n") as lines:
        first, second = [json.loads(line) for line in lines]
    assert first == {
        "id": "row-1",
        "prompt": CHAT,
        "completion": "Zwölf \u2028 Uhr",
        "sample_index": 0,
        "seed": 2**53 - 1,
        "finish_reason": "stop",
        "num_tokens": 4,
        "model": "tiny-dpo",
        "side": "policy",
    }
    assert second == first | {"sample_index": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["completions.jsonl"]


@pytest.mark.parametrize("text", ["a\u2028b", "a\u0085b\u2029", "a\r\nb\x0b\x0c", "\u001c"])
def test_what_was_written_is_read_back_whatever_ends_a_line_elsewhere(tmp_path, text):
    """`str.splitlines` would cut these texts."""
    written = [record(0, model=text), record(1)]
    write_jsonl(written, tmp_path / "completions.jsonl")
    assert read_jsonl(tmp_path / "completions.jsonl") == [asdict(entry) for entry in written]


def test_alpaca_eval_is_an_array_with_one_output_per_prompt(tmp_path):
    path = tmp_path / "alpaca_eval.json"
    write_alpaca_eval([record(0), record(1)], path, dataset="heldout")
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {
            "instruction": "Wie spät ist es?\n",
            "output": "Zwölf \u2028 Uhr",
            "generator": "tiny-dpo",
            "dataset": "heldout",
        }
    ]


def test_alpaca_eval_refuses_two_models(tmp_path):
    with pytest.raises(DataError, match="one generator, these records have a, b"):
        write_alpaca_eval([record(model="b"), record(model="a")], tmp_path / "x.json", dataset="heldout")
    assert not list(tmp_path.iterdir())


def test_instruction_keeps_a_lone_message_and_names_the_turns_of_several():
    assert instruction("Human: hi ") == "Human: hi "
    assert instruction(CHAT) == "Wie spät ist es?\n"
    turns = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert instruction(turns) == "system: Be brief.\n\nuser: Wie spät ist es?\n"
