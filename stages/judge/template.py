"""The question that is put to a language model, and how its reply is read.

In: the name of a template in `templates/`, or the path of a YAML file with `system` (optional), `user` and `verdicts`.
Out: chat messages for two texts, and the verdict in a reply.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cache.errors import UsageError
from stages.generation.completion_files import instruction
from stages.judge.contract import Question

FOLDER = Path(__file__).with_name("templates")
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
PLACEHOLDER = re.compile(r"\{(prompt|first|second)\}")
VALUES = {"first": 1.0, "second": 0.0, "tie": 0.5}
# What reasoning models write before their reply, where the server leaves it in.
THINKING_END = "</think>"


@dataclass(frozen=True)
class JudgeTemplate:
    """A question with {prompt}, {first} and {second}, and a regular expression for each verdict."""

    system: str | None
    user: str
    verdicts: Mapping[str, str]

    @classmethod
    def of(cls, name: str) -> "JudgeTemplate":
        """The template of this name, or in this file; raises `UsageError` if there is none."""
        path = FOLDER / f"{name}.yaml" if name in NAMES else Path(name).expanduser()
        if not path.is_file():
            raise UsageError(
                f"judge.template is {name}, which is neither a file nor one of {', '.join(NAMES)}. Give the path of a YAML file like those in {FOLDER}."
            )
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not valid YAML: {error}") from error
        _check(path, content)
        return cls(content.get("system"), content["user"], content["verdicts"])

    @property
    def identity(self) -> dict[str, Any]:
        """All of it."""
        return {"system": self.system, "user": self.user, "verdicts": dict(self.verdicts)}

    def messages(self, question: Question) -> list[dict[str, str]]:
        """The chat messages of a question with two texts."""
        first, second = question.texts
        parts = {"prompt": instruction(question.prompt), "first": first, "second": second}
        # In one pass, so that a text with {second} in it stays as it is.
        user = PLACEHOLDER.sub(lambda match: parts[match[1]], self.user)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": user}]

    def verdict(self, reply: str) -> float | None:
        """1 for the first text, 0 for the second, 0.5 for a tie; None unless the reply has exactly one of them."""
        said = reply.rsplit(THINKING_END, 1)[-1].strip()
        found = [name for name, pattern in self.verdicts.items() if re.search(pattern, said)]
        return VALUES[found[0]] if len(found) == 1 else None


def _check(path: Path, content: Any) -> None:
    if not isinstance(content, Mapping) or not isinstance(content.get("user"), str):
        raise UsageError(f"{path}: expected the keys system (optional), user and verdicts.")
    unknown = sorted(content.keys() - {"system", "user", "verdicts"})
    if unknown or not isinstance(content.get("system", ""), str):
        what = f"unknown key {unknown[0]}" if unknown else "system is no text"
        raise UsageError(f"{path}: {what}; expected system (optional), user and verdicts.")
    missing = {"prompt", "first", "second"} - set(PLACEHOLDER.findall(content["user"]))
    if missing:
        raise UsageError(f"{path}: user lacks {{{'}, {'.join(sorted(missing))}}}.")
    verdicts = content.get("verdicts")
    if not isinstance(verdicts, Mapping) or not {"first", "second"} <= verdicts.keys() <= VALUES.keys():
        raise UsageError(
            f"{path}: verdicts: expected a regular expression for first, second and, if there are ties, tie."
        )
    for name, pattern in verdicts.items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UsageError(f"{path}: verdicts.{name} is no regular expression ({error}).") from error
