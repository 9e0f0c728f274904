"""The configuration block of `align sweep`: which keys vary, and how."""

from typing import Annotated, Any, Literal

from pydantic import Field, StrictFloat, StrictInt, model_validator

from stages.settings.fields import Flag, NonNegativeInt, PositiveInt, Settings

Number = StrictInt | StrictFloat
Values = Annotated[list[Any], Field(min_length=1)]


class Range(Settings):
    """Numbers from `min` to `max`, drawn uniformly or with `log` uniformly in the logarithm."""

    min: Number
    max: Number
    log: Flag = False

    @model_validator(mode="after")
    def _is_range(self) -> "Range":
        if not self.min < self.max:
            raise ValueError(f"expected min < max, found {self.min} and {self.max}")
        if self.log and self.min <= 0:
            raise ValueError(f"expected min > 0 with log, found {self.min}")
        return self


class SweepSettings(Settings):
    """Trainings that differ in a few keys."""

    keys: dict[str, Values | Range] = Field(
        default={},
        description="the keys that vary, each with its values: {train.learning_rate: [1e-6, 3e-6], loss.beta: [0.1, 0.5]}; the key loss takes names of losses or whole blocks; a random search also takes {min: 1e-7, max: 1e-5, log: true}",
    )
    method: Literal["grid", "random"] = Field(
        default="grid", description="every combination of the values, or num_samples random draws"
    )
    num_samples: PositiveInt = Field(default=16, description="combinations that a random search draws")
    seed: NonNegativeInt = Field(default=0, description="seed of the random draws")
    seeds: list[NonNegativeInt] = Field(
        default=[],
        description="values of train.seed, with each of which every combination is trained; their spread says which differences are noise",
    )
    metric: str = Field(
        default="rewards/accuracies",
        description="held-out metric that ranks the trainings, or win_rate where a judge is named",
    )
    devices: list[NonNegativeInt] = Field(
        default=[],
        description="GPUs by number: each trains one at a time; none means one training after another on what is visible",
    )
