"""Several models against one baseline, as figures.

In: completions, and the verdicts of each model's pairs where there is a judge. Out: a `Comparison`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stages.compare.completions import Completed
from stages.compare.length_control import LengthControlled, length_controlled
from stages.compare.text_figures import TextFigures, text_figures
from stages.compare.verdicts import Outcome, Verdict, outcomes
from stages.compare.win_rate import PositionBias, WinRate, position_bias, win_rate


@dataclass(frozen=True)
class Against:
    """A model against the baseline by one judge; `rate` is None where no pair has a verdict."""

    judge: str
    outcomes: list[Outcome]
    rate: WinRate | None
    length_controlled: LengthControlled
    position: PositionBias | None
    mean_score: float | None
    mean_baseline_score: float | None

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> "Against":
        """The figures of the verdicts of one model's pairs."""
        found = outcomes(verdicts)
        decided = any(outcome.preference is not None for outcome in found)
        return cls(
            verdicts[0].judge,
            found,
            win_rate(found) if decided else None,
            length_controlled(found),
            position_bias(found),
            _mean([verdict.score for verdict in verdicts]),
            _mean([verdict.baseline_score for verdict in verdicts]),
        )

    def as_json(self) -> dict[str, Any]:
        """The figures as plain data, without the pairs."""
        return {
            "judge": self.judge,
            "win_rate": self.rate and asdict(self.rate),
            "length_controlled": asdict(self.length_controlled),
            "position_bias": self.position and asdict(self.position),
            "mean_score": self.mean_score,
            "mean_baseline_score": self.mean_baseline_score,
        }


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class Compared:
    """The completions of one model, their figures, and how they do against the baseline if that was judged."""

    name: str
    completions: list[Completed]
    texts: TextFigures
    against: Against | None = None

    @classmethod
    def of(cls, name: str, completions: Sequence[Completed], verdicts: Sequence[Verdict] = ()) -> "Compared":
        """The figures of one model; without verdicts those of its texts alone."""
        against = Against.of(verdicts) if verdicts else None
        return cls(name, list(completions), text_figures(completions), against)


@dataclass(frozen=True)
class Comparison:
    """A baseline, and the models that were compared with it."""

    baseline: Compared
    models: list[Compared]

    def as_json(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {
            "baseline": {"name": self.baseline.name, "texts": asdict(self.baseline.texts)},
            "models": [
                {
                    "name": model.name,
                    "texts": asdict(model.texts),
                    **(model.against.as_json() if model.against else {}),
                }
                for model in self.models
            ],
        }
