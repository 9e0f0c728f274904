"""The configuration block of `align judge`: which judge, and how it is asked."""

from typing import Annotated, Literal

from pydantic import Field

from stages.settings.fields import (
    Flag,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
)

# A key itself, which is never so short of small letters, must not be taken for the name of its variable.
VariableName = Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")]

# The keys that name a judge.
KINDS = ("function", "reward_model", "endpoint", "implicit", "answers")


class JudgeSettings(Settings):
    """Who judges completions: one of function, reward_model, endpoint, implicit, answers."""

    function: str | None = Field(
        default=None,
        description="a Python function `package.module:name` of (prompt, completion) that returns a score; it runs on this machine as your own code",
    )
    reward_model: str | None = Field(
        default=None,
        description="folder or hub name of a reward model: a sequence classifier with one output",
    )
    endpoint: str | None = Field(
        default=None,
        description="address of an OpenAI-compatible chat endpoint up to and with /v1; its model compares two completions",
    )
    implicit: Flag = Field(
        default=False,
        description="score by the implicit reward beta * log(policy/reference), of judge.implicit_model and the reference",
    )
    answers: str | None = Field(
        default=None,
        description="file of reference answers (a prompt and an answer in each row); a completion scores 1 if it agrees, else 0",
    )
    baseline: str | None = Field(
        default=None,
        description="file or folder of completions to compare with; null takes those of the reference",
    )
    implicit_model: str | None = Field(
        default=None,
        description="folder or hub name of the policy of the implicit reward; null takes the policy that this configuration trains",
    )
    endpoint_model: str | None = Field(
        default=None, description="name of the model at the endpoint; null takes the only one that it lists"
    )
    template: str = Field(
        default="mt-bench",
        description="question put to the endpoint's model: mt-bench, alpaca-eval, or the path of a YAML file like those in stages/judge/templates",
    )
    both_orders: Flag = Field(
        default=True,
        description="ask for each pair twice, with either completion first; if the verdicts differ it is a tie",
    )
    temperature: NonNegativeFloat | None = Field(
        default=0.0, description="temperature of the endpoint's model; null leaves it to the endpoint"
    )
    max_tokens: PositiveInt = Field(
        default=1024, description="maximum number of tokens in a reply of the endpoint's model"
    )
    concurrency: PositiveInt = Field(default=8, description="requests to the endpoint at a time")
    max_retries: NonNegativeInt = Field(
        default=8,
        description="retries of a request after 429, 5xx, a cut connection or a timeout, waiting longer each time or as long as Retry-After says",
    )
    timeout_seconds: PositiveFloat = Field(default=120.0, description="seconds to wait for a reply")
    api_key_variable: VariableName | None = Field(
        default=None,
        description="name of the environment variable with the endpoint's API key; null sends none",
    )
    prompt_price: NonNegativeFloat = Field(
        default=0.0, description="price of a million tokens that the endpoint reads, for the cost count"
    )
    completion_price: NonNegativeFloat = Field(
        default=0.0, description="price of a million tokens that the endpoint writes"
    )
    beta: PositiveFloat = Field(default=0.1, description="beta of the implicit reward")
    match: Literal["exact", "number", "ifeval"] = Field(
        default="exact",
        description="how a completion agrees with a reference answer: 'exact' but for white space; 'number': equal numbers, those after #### or the last ones; 'ifeval': it follows all instructions of IFEval's row (extra 'ifeval')",
    )

    @property
    def is_named(self) -> bool:
        """Whether the block names a judge."""
        return any(getattr(self, kind) for kind in KINDS)
