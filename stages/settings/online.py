"""The configuration block of `align online`: rounds of sampling, judging and training."""

from typing import Annotated, Literal

from pydantic import Field

from stages.settings.fields import NonNegativeInt, PositiveInt, Settings

AtLeastTwo = Annotated[int, Field(ge=2, strict=True)]
Pairing = Literal["best_worst", "best_random", "best_of_n"]
Unfinished = Literal["worst", "drop", "keep"]


class OnlineSettings(Settings):
    """What a round is."""

    rounds: PositiveInt = Field(default=5, description="rounds of sampling, judging and training")
    prompts: str | None = Field(
        default=None,
        description="prompts of the rounds, as sample.prompts; null takes those of data.path that are not held out",
    )
    prompts_per_round: PositiveInt = Field(
        default=64,
        description="prompts sampled in a round, each round others, in an order drawn from online.seed; as many as train.batch_size make a round one optimizer step",
    )
    num_samples: AtLeastTwo = Field(
        default=4, description="completions of each prompt, of which the judge's scores make one pair"
    )
    pairing: Pairing = Field(
        default="best_worst",
        description="chosen against rejected: the best against the worst, the best against a random other one, or (best_of_n, for the loss sft) the best alone",
    )
    unfinished: Unfinished = Field(
        default="worst",
        description="completions that did not end before sample.max_tokens: worse than every one that did, left out, or judged as they are",
    )
    reference: Literal["fixed", "previous"] = Field(
        default="fixed",
        description="the reference of each round: that of the configuration, or the policy of the round before",
    )
    seed: NonNegativeInt = Field(
        default=0, description="seed of the order of the prompts and of random pairs"
    )
