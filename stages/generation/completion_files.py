"""Completions as the files that people and evaluation tools read.

In:  `CompletionRecord`s and a path.  Out: our own JSONL, or AlpacaEval's JSON, written whole or not at all.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cache.errors import DataError
from cache.files import write_bytes
from stages.data.messages import Message


@dataclass(frozen=True)
class CompletionRecord:
    """One completion with where it comes from; the fields are the keys of a line of our JSONL.

    `num_tokens` counts the stop token. `model` is a name for people (a leaderboard's "generator"); `side` is
    policy, reference, or model where `sample.model` named it.
    """

    id: str
    prompt: list[Message] | str
    completion: str
    sample_index: int
    seed: int
    finish_reason: Literal["stop", "length"]
    num_tokens: int
    model: str
    side: str


def write_jsonl(records: Iterable[CompletionRecord], path: Path) -> None:
    """Write one JSON object per line, in the order given."""
    lines = [json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records]
    write_bytes(path, "".join(lines).encode())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that `write_jsonl` wrote; a line ends at a line feed and nowhere else."""
    with open(path, encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def write_alpaca_eval(records: Sequence[CompletionRecord], path: Path, dataset: str) -> None:
    """Write what `alpaca_eval --model_outputs` reads: a JSON array of one generator's outputs.

    AlpacaEval joins two files on the instruction, so it takes one output per prompt: sample 0.
    Raises `DataError` when the records come from more than one model.
    """
    generators = sorted({record.model for record in records})
    if len(generators) > 1:
        raise DataError(
            f"AlpacaEval's file holds one generator, these records have {', '.join(generators)}: write one file each."
        )
    rows = [
        {
            "instruction": instruction(record.prompt),
            "output": record.completion,
            "generator": record.model,
            "dataset": dataset,
        }
        for record in records
        if record.sample_index == 0
    ]
    write_bytes(path, (json.dumps(rows, indent=2, ensure_ascii=False) + "\n").encode())


def instruction(prompt: list[Message] | str) -> str:
    """The prompt as one text: a lone user message byte for byte, several turns as `role: content` paragraphs."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
