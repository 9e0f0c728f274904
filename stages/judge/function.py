"""A judge that is a Python function of the user: `package.module:name` of (prompt, completion), which returns a score.

It is imported from the Python path and from the working folder, and runs with all rights of this process.
"""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from cache.errors import UsageError
from cache.files import sha256_file
from stages.data.messages import Message
from stages.judge.contract import Answer, Keep, Question

BATCH = 256


@dataclass(frozen=True)
class FunctionJudge:
    """Scores each completion by a function; the sha256 of the function's source file identifies it."""

    path: str
    function: Callable[[Any, str], Any]
    source_sha256: str
    compares: bool = False

    @classmethod
    def of(cls, path: str) -> "FunctionJudge":
        """Import the function; raises `UsageError` if there is none."""
        module_name, colon, name = path.partition(":")
        if not (module_name and colon and name.isidentifier()):
            raise UsageError(
                f"judge.function is {path}; expected package.module:name, for example rules:politeness for the function politeness in rules.py."
            )
        module = _imported(module_name, path)
        function = getattr(module, name, None)
        if not callable(function):
            known = [
                key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
            ]
            what = "is no function" if hasattr(module, name) else "does not exist"
            raise UsageError(
                f"judge.function is {path}, and {name} {what} in {module_name}. It has: {', '.join(known) or 'no function'}."
            )
        source = Path(getattr(module, "__file__", None) or "")
        if source.suffix != ".py" or not source.is_file():
            raise UsageError(
                f"judge.function is {path}, and {module_name} has no Python file, by whose content verdicts are kept. Wrap it in a function of your own."
            )
        return cls(path, function, sha256_file(source))

    @property
    def name(self) -> str:
        """The function's name."""
        return self.path.partition(":")[2]

    @property
    def identity(self) -> dict[str, Any]:
        """The function and the content of its file."""
        return {"kind": "function", "function": self.path, "source": self.source_sha256}

    def answer(self, questions: Sequence[Question], keep: Keep) -> None:
        """Score every text; raises `UsageError` as `score`."""
        for start in range(0, len(questions), BATCH):
            places = range(start, min(start + BATCH, len(questions)))
            keep(
                [
                    (place, Answer(self.score(questions[place].prompt, questions[place].texts[0])))
                    for place in places
                ]
            )

    def score(self, prompt: str | list[Message], completion: str) -> float:
        """The score of one completion; raises `UsageError` where the function raises or returns no number."""
        try:
            score = self.function(prompt, completion)
        except Exception as error:  # whatever the user's code raises
            raise UsageError(
                f"judge.function {self.path} raised {type(error).__name__}: {error}, for the completion {_brief(completion)}. See where with --debug."
            ) from error
        if not isinstance(score, Real) or not math.isfinite(score):
            raise UsageError(
                f"judge.function {self.path} returned {score!r} for the completion {_brief(completion)}; expected a finite number."
            )
        return float(score)


def _imported(module_name: str, path: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` does
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"judge.function is {path}, and there is no module {error.name}. Run align in its folder, or put that folder into PYTHONPATH."
        ) from error
    except Exception as error:  # whatever the user's code raises
        raise UsageError(
            f"judge.function is {path}, and importing {module_name} raised {type(error).__name__}: {error}. See where with --debug."
        ) from error


def _brief(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
