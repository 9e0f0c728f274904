"""The interface of a loss: the tensors it is given, what it returns, and how it declares what it needs.

A loss is a frozen pydantic model: its fields are its hyperparameters with their defaults, `__call__` is its maths,
and its class variables declare what it needs. It sees tensors only: no model, no ranks, no micro-batches. The
training step reads the declarations and fills the tensors (`stages/train/step/`).

Axes in shape comments, here and in `stages/train/step/`: `rows` (completions of a micro-batch or a step), `pairs`
(chosen and rejected), `units` (pairs or rows, see `Loss.unit`); those of a pack are in `stages/engine/packs.py`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


# The fields of `Rows` that are functions of the policy's weights and are differentiated; everything else is data.
CARRY_GRADIENT = ("logps", "shared_logps", "prompt_logps")


@dataclass(frozen=True)
class Rows:
    """Log-probs of completions and their data: (rows,) each, float64; log-probs in nats.

    Float64, because losses subtract sums of up to 1e5 nats from each other, and a tenth of a nat matters.

    Sums and numbers are over the tokens whose completion mask is 1, unless said otherwise.

    The fields in `CARRY_GRADIENT` carry the gradient. A field that may be None is filled exactly if the loss lists it
    in `Loss.needs`.
    """

    logps: Tensor
    num_tokens: Tensor
    ref_logps: Tensor | None = None
    # From the data. The weight of the chosen row multiplies the loss of a pair.
    weights: Tensor | None = None
    scores: Tensor | None = None
    # Sums over the first min(n_chosen, n_rejected) tokens of each side of a pair.
    shared_logps: Tensor | None = None
    ref_shared_logps: Tensor | None = None
    # Mean over the tokens of log sum_v pi(v)^2, v over the vocabulary.
    collision_logps: Tensor | None = None
    # Sum over the tokens of the row's prompt from the second on, and their number. The rows of an example share
    # one prompt, which is scored once; each row holds the sum.
    prompt_logps: Tensor | None = None
    num_prompt_tokens: Tensor | None = None
    # Weight of an undesirable row by its prompt, as `DensityRatios` computes it; 1 for a desirable row.
    density_ratios: Tensor | None = None

    @property
    def logratios(self) -> Tensor:
        """Policy minus reference, summed over the completion: D in the formulas."""
        assert self.ref_logps is not None, "ref_logps is not in the needs of the loss"
        return self.logps - self.ref_logps

    @property
    def mean_logps(self) -> Tensor:
        """Per-token mean log-prob: a in the formulas."""
        return self.logps / self.num_tokens

    def get(self, field_name: str) -> Tensor:
        """The field of this name, which has to be filled."""
        return vars(self)[field_name]

    def select(self, index: Tensor) -> "Rows":
        """The rows at `index`, in that order."""
        values: dict[str, Any] = {
            name: None if value is None else value[index] for name, value in vars(self).items()
        }
        return Rows(**values)


@dataclass(frozen=True)
class Batch:
    """Rows of a micro-batch, or of a whole step, and which of them are compared.

    Unpaired data has no pairs. In paired data each chosen row is desirable and each rejected row is not. A row of a
    ranked list may be in several pairs and on both sides, so only data without such rows goes with a loss that lists
    "desirable" in its needs. Rows of one prompt have one number in `lists`.
    """

    rows: Rows
    desirable: Tensor  # (rows,), bool
    chosen: Tensor  # (pairs,), indices into the rows
    rejected: Tensor  # (pairs,), indices into the rows
    lists: Tensor  # (rows,), from 0 to num_lists - 1
    num_lists: int

    def pairs(self) -> tuple[Rows, Rows]:
        """The chosen and the rejected row of each pair: `Rows` of shape (pairs,)."""
        return self.rows.select(self.chosen), self.rows.select(self.rejected)


@dataclass(frozen=True)
class Step:
    """Statistics of the whole optimizer step, over all micro-batches and ranks.

    `kl`: mean log-ratio (policy minus reference) of the step's mismatched rows, not clamped, without gradient; a
    scalar, None unless the loss needs it. `tokens_per_pair`: mean number of chosen tokens of a pair. `state`: the
    running numbers of the loss from earlier steps, see `Loss.next_state`. `training`: whether `state` will be updated
    by the rows; False in an evaluation.
    """

    kl: Tensor | None = None
    tokens_per_pair: float = 1.0
    state: dict[str, float] = field(default_factory=dict)
    training: bool = True


@dataclass(frozen=True)
class LossOutput:
    """Losses of the units, implicit rewards of the rows, and metrics of this loss alone.

    The step's loss is the mean of `losses` over all units of the step. A metric is the mean of its values over them.
    """

    losses: Tensor  # (units,), with gradient
    rewards: Tensor  # (rows,), without gradient
    metrics: dict[str, Tensor] = field(default_factory=dict)  # (units,) each, without gradient


class Loss(BaseModel):
    """What every loss declares. Subclasses add fields, a `name` literal and `__call__`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # What one entry of `LossOutput.losses` belongs to: a (chosen, rejected) pair, a row, or the rows of a prompt.
    unit: ClassVar[Literal["pair", "row", "list"]] = "pair"
    # The part of `needs` that does not depend on the options.
    always_needs: ClassVar[frozenset[str]] = frozenset({"ref_logps"})
    # The loss of one unit depends on the other units of the step (by sorted values or running statistics), so the
    # loss is called once on the whole step, however that is split into micro-batches and ranks.
    whole_step: ClassVar[bool] = False
    # `next_state` returns numbers that have to be saved in checkpoints.
    keeps_state: ClassVar[bool] = False
    # Training defaults of this loss, for policies of 1-8B parameters with float32 master weights.
    learning_rate: ClassVar[float] = 1e-6
    batch_size: ClassVar[int] = 64

    @property
    def needs(self) -> frozenset[str]:
        """Names of the optional fields of `Rows` and `Step` that this loss reads, and "desirable" if it reads that.

        A loss without "weights" ignores weights, so data with weights other than 1 is an error for it.
        """
        return self.always_needs

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads reference log-probs, so that cache-ref has to run first."""
        return "ref_logps" in self.needs

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """The loss of each unit, in nats. A pure function: no `.item()`, no collective operations."""
        raise NotImplementedError

    def next_state(self, rewards: Tensor, state: dict[str, float]) -> dict[str, float]:
        """The state after a step, from the rewards of all its rows, (rows,), and the state before. Called once a step."""
        return state
