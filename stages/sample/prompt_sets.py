"""The prompt sets that evaluation tools know, recognised by their columns, and the answer files those tools read.

A set is one class: which rows it has, what of a row travels with the completions, and the file that it writes.
`PROMPT_SETS` is the only list; the first that matches the first row of a file is taken for all of it.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from cache.files import write_bytes
from stages.data.messages import Message
from stages.generation.completion_files import CompletionRecord, instruction


class PromptSet:
    """Prompts of any other origin: completions alone, and AlpacaEval's file of the first sample of each prompt."""

    name: ClassVar[str] = "prompts"
    # The columns that completions carry, where a row has them.
    keys: ClassVar[tuple[str, ...]] = (
        *("id", "prompt_id", "question_id", "uid", "key", "category"),
        *("answer", "reference", "target", "instruction_id_list", "kwargs"),
    )

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        """Whether a row has this set's columns."""
        return True

    @classmethod
    def temperature(cls, row: Mapping[str, Any]) -> float | None:
        """The temperature that the set asks for; None takes `sample.temperature`."""
        return None

    @classmethod
    def next_turns(cls, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The questions after the first one."""
        return ()

    @classmethod
    def write(cls, records: Sequence[CompletionRecord], folder: Path) -> None:
        """Write the files that evaluation tools read; the records are in prompt order, those of one prompt together."""
        write_alpaca_eval(records, folder / "alpaca_eval.json", "align")


class AlpacaEval(PromptSet):
    """AlpacaEval's evaluation set; `alpaca_eval --model_outputs alpaca_eval.json` joins on the instruction."""

    name = "AlpacaEval"
    keys = ("dataset",)

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        """Its outputs, those of the baseline, are not read."""
        return row.keys() >= {"instruction", "dataset"} and not row.keys() & {"chosen", "rejected"}

    @classmethod
    def write(cls, records: Sequence[CompletionRecord], folder: Path) -> None:
        """One output for each instruction, with the data set it came from."""
        write_alpaca_eval(records, folder / "alpaca_eval.json", None)


class MTBench(PromptSet):
    """MT-bench and sets of its kind (Vicuna's, the older Arena-Hard): questions of one or more turns, for FastChat's judge."""

    name = "MT-bench"
    keys = ("question_id", "category", "reference")
    # FastChat's temperatures (fastchat/llm_judge/common.py, temperature_config).
    temperatures: ClassVar[Mapping[str, float]] = {
        "writing": 0.7,
        "roleplay": 0.7,
        "extraction": 0.0,
        "math": 0.0,
        "coding": 0.0,
        "reasoning": 0.0,
        "stem": 0.1,
        "humanities": 0.1,
        "arena-hard-200": 0.0,
    }

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        """Ids and turns."""
        return row.keys() >= {"question_id", "turns"} and isinstance(row["turns"], list)

    @classmethod
    def temperature(cls, row: Mapping[str, Any]) -> float | None:
        """That of the question, else of its category."""
        named = row.get("required_temperature")
        return cls.temperatures.get(row.get("category", "")) if named is None else float(named)

    @classmethod
    def next_turns(cls, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The turns after the first; an entry is a text, or has a content."""
        return tuple(turn if isinstance(turn, str) else turn["content"] for turn in row["turns"][1:])

    @classmethod
    def write(cls, records: Sequence[CompletionRecord], folder: Path) -> None:
        """`model_answer/MODEL.jsonl`: the answers of all turns, one choice for each sample."""
        lines = []
        for own in _by_prompt(records):
            samples = sorted({record.sample_index for record in own})
            choices = [
                {"index": sample, "turns": [r.completion for r in own if r.sample_index == sample]}
                for sample in samples
            ]
            lines.append(
                {
                    "question_id": own[0].keys["question_id"],
                    "answer_id": _answer_id(own),
                    "model_id": own[0].model,
                    "choices": choices,
                    "tstamp": time.time(),
                }
            )
        _write_lines(lines, folder / "model_answer" / f"{records[0].model}.jsonl")


class ArenaHard(PromptSet):
    """Arena-Hard 2 (and 0.1 in its layout), for `gen_judgment.py`, which reads the first sample of each prompt.

    Its style control wants markdown counts as well, which its own `utils/add_markdown_info.py` adds to the file.
    """

    name = "Arena-Hard"
    keys = ("uid", "category", "subcategory", "cluster")

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        """A uid, a category and a prompt."""
        return row.keys() >= {"uid", "category", "prompt"}

    @classmethod
    def write(cls, records: Sequence[CompletionRecord], folder: Path) -> None:
        """`model_answer/MODEL.jsonl`: the conversation, whose last message has the answer."""
        lines = []
        for own in _by_prompt(records):
            first, prompt = own[0], own[0].prompt
            asked: list[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
            lines.append(
                {
                    "uid": first.keys["uid"],
                    "ans_id": _answer_id(own),
                    "model": first.model,
                    "messages": [*asked, {"role": "assistant", "content": {"answer": first.completion}}],
                    "tstamp": time.time(),
                }
            )
        _write_lines(lines, folder / "model_answer" / f"{records[0].model}.jsonl")


class IFEval(PromptSet):
    """IFEval; `evaluation_main --input_response_data ifeval.jsonl` joins on the prompt, so it reads one sample of each."""

    name = "IFEval"
    keys = ("key", "instruction_id_list", "kwargs")

    @classmethod
    def matches(cls, row: Mapping[str, Any]) -> bool:
        """Instructions that a program can check."""
        return row.keys() >= {"key", "prompt", "instruction_id_list", "kwargs"}

    @classmethod
    def write(cls, records: Sequence[CompletionRecord], folder: Path) -> None:
        """The prompt and the first response of each row."""
        lines = [
            {
                "key": own[0].keys["key"],
                "prompt": instruction(own[0].prompt),
                "response": own[0].completion,
            }
            for own in _by_prompt(records)
        ]
        _write_lines(lines, folder / "ifeval.jsonl")


PROMPT_SETS: tuple[type[PromptSet], ...] = (IFEval, MTBench, ArenaHard, AlpacaEval, PromptSet)


def set_of(row: Mapping[str, Any]) -> type[PromptSet]:
    """The first set whose columns a row has."""
    return next(one for one in PROMPT_SETS if one.matches(row))


def write_alpaca_eval(records: Sequence[CompletionRecord], path: Path, dataset: str | None) -> None:
    """Write what `alpaca_eval --model_outputs` reads: a JSON array of one generator's outputs.

    AlpacaEval joins two files on the instruction, so it takes one output per prompt: the first turn of sample 0. Without
    `dataset` it is that of the prompt.
    """
    rows = [
        {
            "instruction": instruction(record.prompt),
            "output": record.completion,
            "generator": record.model,
            "dataset": record.keys["dataset"] if dataset is None else dataset,
        }
        for record in records
        if record.sample_index == 0 and record.turn == 1
    ]
    write_bytes(path, (json.dumps(rows, indent=2, ensure_ascii=False) + "\n").encode())


def _by_prompt(records: Sequence[CompletionRecord]) -> list[list[CompletionRecord]]:
    found: dict[str, list[CompletionRecord]] = {}
    for record in records:
        found.setdefault(record.id, []).append(record)
    return list(found.values())


def _answer_id(records: Sequence[CompletionRecord]) -> str:
    """An id of the answers' content, so that the same answers keep it."""
    texts = json.dumps([[record.id, record.model, record.completion] for record in records])
    return hashlib.sha256(texts.encode()).hexdigest()[:22]


def _write_lines(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def conversation(content: str | list[Message], answers: Sequence[tuple[str, str]]) -> list[Message]:
    """The messages of a later turn: the first prompt, and (answer, next question) of each turn before."""
    messages: list[Message] = (
        [{"role": "user", "content": content}] if isinstance(content, str) else [*content]
    )
    for answer, question in answers:
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    return messages
