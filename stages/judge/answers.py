"""A judge with reference answers: a completion scores 1 if it agrees with the answer to its prompt, else 0.

In: a file in which each row has a prompt and an answer, or for `ifeval` IFEval's input data. How they agree is `judge.match`.
"""

import contextlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from cache.errors import DataError, MachineError
from cache.files import sha256_file
from stages.data.prompt_rows import asked
from stages.data.readers import read_source
from stages.data.source_row import BadRow
from stages.generation.completion_files import instruction
from stages.judge.contract import Answer, Keep, Question
from stages.settings.data import DataSettings
from stages.settings.judge import JudgeSettings

ANSWER_COLUMNS = ("answer", "reference", "target", "output")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
# gsm8k's answers end with it.
FINAL = "####"
IFEVAL_COLUMNS = ("key", "prompt", "instruction_id_list", "kwargs")


@dataclass(frozen=True)
class AnswersJudge:
    """Scores each completion by the row of its prompt; `agrees` is given the row and the completion."""

    path: Path
    match: str
    rows: Mapping[str, Mapping[str, Any]]
    agrees: Callable[[Mapping[str, Any], str], bool]
    sha256: str
    compares: bool = False

    @classmethod
    def of(cls, settings: JudgeSettings) -> "AnswersJudge":
        """Read the file; raises `DataError` for a row without a prompt or an answer, and for prompts with two answers."""
        path = Path(settings.answers or "").expanduser()
        if not path.is_file():
            raise DataError(
                f"judge.answers: no such file {path}. Give a .jsonl file with a prompt and an answer in each row."
            )
        match = settings.match
        if match == "ifeval" and importlib.util.find_spec("lm_eval") is None:
            raise MachineError(
                "judge.match=ifeval needs lm-eval, which is not installed. Install it with: pip install -e '.[ifeval]'"
            )
        return cls(path, match, _rows(path, match), MATCHES[match], sha256_file(path))

    @property
    def name(self) -> str:
        """The name of the file, and how answers are matched."""
        return f"{self.path.stem}-{self.match}"

    @property
    def identity(self) -> dict[str, Any]:
        """The content of the file, and how answers are matched."""
        return {"kind": "answers", "answers": self.sha256, "match": self.match}

    def answer(self, questions: Sequence[Question], keep: Keep) -> None:
        """Score every text; a prompt that is not in the file has a problem instead."""
        keep(list(enumerate(map(self._answer, questions))))

    def _answer(self, question: Question) -> Answer:
        row = self.rows.get(instruction(question.prompt).strip())
        if row is None:
            return Answer(None, f"{self.path.name} has no answer to this prompt")
        [completion] = question.texts
        return Answer(float(self.agrees(row, completion)))


def _rows(path: Path, match: str) -> dict[str, Mapping[str, Any]]:
    """The rows by prompt."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in read_source(DataSettings(path=str(path))):
        try:
            if row.value is None:
                raise BadRow(row.problem)
            prompt = instruction(asked(row.value)[1]).strip()
            content = _checked(row.value, match)
        except BadRow as problem:
            raise DataError(f"{row.location}: {problem}. Mend it, or leave it out.") from problem
        if found.setdefault(prompt, content) != content:
            raise DataError(f"{row.location}: its prompt has another answer before. Leave one of them out.")
    return found


def _checked(row: Mapping[str, Any], match: str) -> Mapping[str, Any]:
    """What `agrees` reads of a row; raises `BadRow`."""
    if match == "ifeval":
        missing = [name for name in IFEVAL_COLUMNS if name not in row]
        if missing:
            raise BadRow(
                f"expected IFEval's columns {', '.join(IFEVAL_COLUMNS)}, and {missing[0]} is missing"
            )
        return {name: row[name] for name in IFEVAL_COLUMNS}
    answer = next((row[name] for name in ANSWER_COLUMNS if row.get(name) is not None), None)
    if not isinstance(answer, str | int | float):
        raise BadRow(f"expected an answer in one of the columns {', '.join(ANSWER_COLUMNS)}")
    if match == "number" and final_number(str(answer)) is None:
        raise BadRow(f"expected a number in the answer, found {str(answer)[:60]!r}")
    return {"answer": str(answer)}


def _exact(row: Mapping[str, Any], completion: str) -> bool:
    return row["answer"].split() == completion.split()


def _number(row: Mapping[str, Any], completion: str) -> bool:
    return final_number(row["answer"]) == final_number(completion)


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`, else the last number of a text; `$` and thousands separators do not count."""
    _, marked, end = text.rpartition(FINAL)
    found = NUMBER.findall(end if marked else text)
    if not found:
        return None
    try:
        return Decimal((found[0] if marked else found[-1]).replace(",", ""))
    except InvalidOperation:
        return None


def _ifeval(row: Mapping[str, Any], completion: str) -> bool:
    """Whether all instructions are followed: IFEval's strict accuracy on the level of prompts (arXiv 2311.07911)."""
    with contextlib.redirect_stdout(sys.stderr):  # it prints when it is imported
        rules = importlib.import_module("lm_eval.tasks.ifeval.utils")
    return rules.process_results(dict(row), [completion])["prompt_level_strict_acc"]


MATCHES: dict[str, Callable[[Mapping[str, Any], str], bool]] = {
    "exact": _exact,
    "number": _number,
    "ifeval": _ifeval,
}
