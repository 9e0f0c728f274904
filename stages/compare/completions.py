"""Completions of one model, from an artifact or a file of this or another tool, and the pairs of two models.

In: `completions/NAME`, a .jsonl file, or a JSON array such as AlpacaEval's. Out: `Completed`s, and `Pair`s of those that
answer the same prompt.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.artifacts import is_artifact, open_artifact
from cache.errors import DataError
from stages.data.messages import Message
from stages.data.prompt_rows import asked
from stages.data.source_row import BadRow
from stages.generation.completion_files import FILE, instruction, read_jsonl

# What other tools call the answer, the model and the prompt's id.
TEXT_COLUMNS = ("completion", "output", "response")
MODEL_COLUMNS = ("model", "generator")
NOT_ASKED = "not_asked"
ID_COLUMNS = ("id", "question_id", "key", "uid")


@dataclass(frozen=True)
class Completed:
    """One completion; `finish_reason` and `num_tokens` are None where the file has none.

    `turn` counts the answers of a conversation from 1; the prompt of a later one has the model's own earlier answers.
    """

    id: str
    prompt: str | list[Message]
    completion: str
    sample_index: int
    model: str
    finish_reason: str | None = None
    num_tokens: int | None = None
    turn: int = 1

    @property
    def prompt_text(self) -> str:
        """The prompt as one text."""
        return instruction(self.prompt)

    @property
    def question(self) -> str:
        """The prompt of the first turn as one text; each later turn adds an answer and a question."""
        later = 2 * (self.turn - 1)
        return instruction(self.prompt[: len(self.prompt) - later]) if later else self.prompt_text

    @property
    def asked(self) -> tuple[str, int]:
        """What completions of several files are matched by: the first prompt, and the turn."""
        return self.question, self.turn


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt: that of the model in question, and that of the baseline."""

    completion: Completed
    baseline: Completed


@dataclass(frozen=True)
class Paired:
    """The pairs of two files, and how many completions of each have no partner in the other."""

    pairs: list[Pair]
    alone: int
    baseline_alone: int


def completions_of(path: Path) -> list[Completed]:
    """The completions of an artifact's folder or of a file; raises `DataError` where there are none.

    Turns that `align sample` could not ask are left out.
    """
    file = _file_in(path)
    seen: dict[str, int] = defaultdict(int)
    rows = [_completed(row, number, file, seen) for number, row in enumerate(_rows(file), 1)]
    found = [entry for entry in rows if entry.finish_reason != NOT_ASKED]
    if not found:
        raise DataError(f"{file} has no completions. Make some with: align sample")
    return found


def _file_in(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(
            f"No such file or folder of completions: {path}. Give a folder that `align sample` wrote, a .jsonl file, or "
            f"AlpacaEval's JSON."
        )
    if not (path / FILE).is_file():
        raise DataError(f"{path} has no {FILE}. Give a folder that `align sample` wrote, or a file.")
    if is_artifact(path):
        open_artifact(path).check_files()
    return path / FILE


def _rows(file: Path) -> list[Any]:
    try:
        with open(file, encoding="utf-8") as text:
            is_array = text.read(64).lstrip().startswith("[")
        return json.loads(file.read_bytes()) if is_array else read_jsonl(file)
    except ValueError as error:  # also a UnicodeDecodeError
        raise DataError(
            f"{file} is not JSON ({error}). Give JSON objects, one a line, or one array."
        ) from error


def _completed(row: Any, number: int, file: Path, seen: dict[str, int]) -> Completed:
    """One entry of a file; `seen` counts the completions of each prompt, for files without a sample index."""
    where = f"{file}:{number}"
    text = _first(row, TEXT_COLUMNS)
    if not isinstance(text, str):
        raise DataError(
            f"{where} has no completion: expected a text under {', '.join(TEXT_COLUMNS)}. Rename the column."
        )
    try:
        prompt = row["prompt"] if isinstance(row.get("prompt"), str) else asked(row)[1]
    except BadRow as problem:
        raise DataError(f"{where}: {problem}. Completions are matched by their prompts.") from problem
    counted = seen[instruction(prompt)]
    seen[instruction(prompt)] += 1
    return Completed(
        id=str(_first(row, ID_COLUMNS) if _first(row, ID_COLUMNS) is not None else number),
        prompt=prompt,
        completion=text,
        sample_index=row.get("sample_index", counted),
        model=str(_first(row, MODEL_COLUMNS) or file.stem),
        finish_reason=row.get("finish_reason"),
        num_tokens=row.get("num_tokens"),
        turn=row.get("turn", 1),
    )


def _first(row: Any, names: Sequence[str]) -> Any:
    if not isinstance(row, Mapping):
        return None
    return next((row[name] for name in names if row.get(name) is not None), None)


def paired(completions: Sequence[Completed], baseline: Sequence[Completed]) -> Paired:
    """The pairs with equal prompts and sample indices, in the order of `completions`.

    A baseline with one completion of a prompt is compared with every sample of it. Raises `DataError` if there is no pair.
    """
    samples: dict[tuple[str, int], dict[int, Completed]] = defaultdict(dict)
    for entry in baseline:
        samples[entry.asked][entry.sample_index] = entry
    pairs, used = [], set()
    for entry in completions:
        own = samples.get(entry.asked, {})
        partner = next(iter(own.values())) if len(own) == 1 else own.get(entry.sample_index)
        if partner is not None:
            pairs.append(Pair(entry, partner))
            used.add((partner.asked, partner.sample_index))
    if not pairs:
        raise DataError(
            f"The completions of {completions[0].model} and {baseline[0].model} answer no common prompt, the first "
            f"{_brief(completions[0])} and {_brief(baseline[0])}. Sample both with the same prompts."
        )
    return Paired(pairs, len(completions) - len(pairs), sum(map(len, samples.values())) - len(used))


def _brief(entry: Completed) -> str:
    text = " ".join(entry.prompt_text.split())
    return repr(text if len(text) <= 60 else text[:57] + "...")
