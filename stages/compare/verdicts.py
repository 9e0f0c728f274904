"""Verdicts: what a judge said of one completion, or of two in one order, and what follows for a pair.

In: `verdicts.jsonl`, one JSON object a line. Out: `Verdict`s, and one `Outcome` for each pair.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cache.artifacts import is_artifact, open_artifact
from cache.errors import DataError
from cache.files import write_bytes
from stages.compare.completions import Completed
from stages.generation.completion_files import read_jsonl

VERDICTS = "verdicts.jsonl"
TIE = 0.5
Order = Literal["completion_first", "baseline_first"]


@dataclass(frozen=True)
class Verdict:
    """What a judge said, with both texts.

    A judge that scores gives `score` and, with a baseline, `baseline_score`, from which the preference follows; one that
    compares gives `preference` for one `order`. `preference` is 1 where the completion is better, 0 where the baseline is,
    0.5 for a tie. It is None without a baseline, and where `problem` says why there is none. `cost` is in the unit of the
    prices in the configuration; tokens are those of the judge.
    """

    completion: Completed
    baseline: Completed | None
    judge: str
    judge_fingerprint: str
    preference: float | None = None
    score: float | None = None
    baseline_score: float | None = None
    order: Order | None = None
    problem: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    reply: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The object of a line; the fields of the baseline have names that begin with it."""
        own, other = self.completion, self.baseline
        return {
            **{name: getattr(own, name) for name in _SHARED},
            **{name: getattr(own, name) for name in _TEXT},
            **{_of_baseline(name): getattr(other, name) if other else None for name in _TEXT},
            **{name: getattr(self, name) for name in _OWN},
        }

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Verdict":
        """The verdict of a line; raises KeyError for a missing field."""
        shared = {name: row[name] for name in _SHARED}
        own = Completed(**shared, **{name: row[name] for name in _TEXT})
        other = {name: row[_of_baseline(name)] for name in _TEXT}
        baseline = None if other["completion"] is None else Completed(**shared, **other)
        return cls(own, baseline, **{name: row[name] for name in _OWN})


_SHARED = ("id", "turn", "sample_index")
_TEXT = ("prompt", "model", "completion", "finish_reason", "num_tokens")
_OWN = tuple(name for name in Verdict.__dataclass_fields__ if name not in ("completion", "baseline"))


def _of_baseline(name: str) -> str:
    return f"baseline_{name}"


def write_verdicts(verdicts: Iterable[Verdict], path: Path) -> None:
    """Write one JSON object a line, in the order given."""
    lines = [
        json.dumps(verdict.as_json(), ensure_ascii=False, allow_nan=False) + "\n" for verdict in verdicts
    ]
    write_bytes(path, "".join(lines).encode())


def is_verdicts(path: Path) -> bool:
    """Whether a folder is an artifact of verdicts."""
    return (path / VERDICTS).is_file()


def read_verdicts(folder: Path) -> list[Verdict]:
    """The verdicts of an artifact; raises `DataError` if the file has another layout."""
    if is_artifact(folder):
        open_artifact(folder).check_files()
    try:
        return [Verdict.of(row) for row in read_jsonl(folder / VERDICTS)]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / VERDICTS} is no file of verdicts ({error!r}). Make it with: align judge"
        ) from error


@dataclass(frozen=True)
class Outcome:
    """The result of a pair: `preference` as in a verdict, of all orders that were asked; None if one has a problem."""

    verdicts: Sequence[Verdict]

    @property
    def completion(self) -> Completed:
        """The completion in question."""
        return self.verdicts[0].completion

    @property
    def baseline(self) -> Completed:
        """The completion that it is compared with."""
        baseline = self.verdicts[0].baseline
        assert baseline is not None, "a verdict without a baseline has no outcome"
        return baseline

    @property
    def both_orders(self) -> bool:
        """Whether the judge was asked in both orders and answered both."""
        return len({verdict.order for verdict in self.verdicts}) == 2 and not self.problem

    @property
    def problem(self) -> str | None:
        """Why there is no preference."""
        return next((verdict.problem for verdict in self.verdicts if verdict.problem), None)

    @property
    def preference(self) -> float | None:
        """1, 0, or 0.5: also where the orders disagree, as in MT-bench (arXiv 2306.05685, section 3.4)."""
        found = {verdict.preference for verdict in self.verdicts}
        if self.problem or None in found:
            return None
        return found.pop() if len(found) == 1 else TIE


def outcomes(verdicts: Iterable[Verdict]) -> list[Outcome]:
    """The verdicts of each pair together, in the order of their first verdicts."""
    groups: dict[tuple[Any, ...], list[Verdict]] = {}
    for verdict in verdicts:
        own = verdict.completion
        groups.setdefault((own.id, own.asked, own.sample_index), []).append(verdict)
    return [Outcome(group) for group in groups.values()]
