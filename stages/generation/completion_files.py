"""Completions in a file of one line each, that people and the stages after `sample` read.

In: `CompletionRecord`s and a path. Out: JSONL with all fields, written whole or not at all.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cache.files import write_bytes
from stages.data.messages import Message

FILE = "completions.jsonl"


@dataclass(frozen=True)
class CompletionRecord:
    """One completion with its origin; the fields are the keys of a line in `completions.jsonl`.

    `prompt` is all that the model saw, the earlier turns included; `turn` counts the answers of a prompt from 1.
    `num_tokens` counts the stop token. `finish_reason` is "not_asked" where an earlier answer left no room for this one or
    spells a special token; this one is empty then. `model` is the model's short name. `keys` are the prompt's own ids and categories.
    `token_ids` are what the model wrote, the stop token included: its text may have other ids when it is tokenized.
    """

    id: str
    prompt: list[Message] | str
    completion: str
    turn: int
    sample_index: int
    seed: int
    finish_reason: Literal["stop", "length", "not_asked"]
    num_tokens: int
    model: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)


def write_jsonl(records: Iterable[CompletionRecord], path: Path) -> None:
    """Write one JSON object per line, in the order given."""
    lines = [json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records]
    write_bytes(path, "".join(lines).encode())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that `write_jsonl` wrote; a line ends at a line feed and nowhere else."""
    with open(path, encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def instruction(prompt: list[Message] | str) -> str:
    """The prompt as one text: a lone user message byte for byte, several turns as `role: content` paragraphs."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
