"""The files of stage 4, as their readers see them."""

import json
from dataclasses import asdict

import pytest

from stages.generation.completion_files import (
    CompletionRecord,
    instruction,
    read_jsonl,
    write_jsonl,
)

CHAT = [{"role": "user", "content": "Wie spät ist es?\n"}]


def record(sample_index: int = 0, model: str = "tiny-dpo", prompt=CHAT) -> CompletionRecord:
    return CompletionRecord(
        "row-1", prompt, "Zwölf \u2028 Uhr", 1, sample_index, 2**53 - 1, "stop", 4, model, {"uid": "a"}
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
        "turn": 1,
        "sample_index": 0,
        "seed": 2**53 - 1,
        "finish_reason": "stop",
        "num_tokens": 4,
        "model": "tiny-dpo",
        "keys": {"uid": "a"},
        "token_ids": [],
    }
    assert second == first | {"sample_index": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["completions.jsonl"]


@pytest.mark.parametrize("text", ["a\u2028b", "a\u0085b\u2029", "a\r\nb\x0b\x0c", "\u001c"])
def test_what_was_written_is_read_back_whatever_ends_a_line_elsewhere(tmp_path, text):
    """`str.splitlines` would cut these texts."""
    written = [record(0, model=text), record(1)]
    write_jsonl(written, tmp_path / "completions.jsonl")
    assert read_jsonl(tmp_path / "completions.jsonl") == [asdict(entry) for entry in written]


def test_instruction_keeps_a_lone_message_and_names_the_turns_of_several():
    assert instruction("Human: hi ") == "Human: hi "
    assert instruction(CHAT) == "Wie spät ist es?\n"
    turns = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert instruction(turns) == "system: Be brief.\n\nuser: Wie spät ist es?\n"
