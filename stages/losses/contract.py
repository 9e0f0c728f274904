"""What a loss is given, what it returns, and what it may ask for.

A loss is a frozen pydantic model: its fields are its hyperparameters with that loss's own defaults,
`__call__` is its maths, and its class variables say what it needs. It never sees a model, a rank, a
micro-batch boundary or a name. The training loop asks for the needs and hands over tensors.
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
    """Log-probs of completions, one entry per row: shape (rows,), float32, nats, over kept tokens.

    `CARRY_GRADIENT` names the fields that carry the gradient; everything else is data. A field that may be None is
    filled exactly when the loss lists it in `Loss.needs`.
    """

    logps: Tensor
    num_tokens: Tensor
    ref_logps: Tensor | None = None
    # Multiplies the loss of a pair (the chosen row's weight).
    weights: Tensor | None = None
    scores: Tensor | None = None
    # Sums over the first min(n_chosen, n_rejected) kept tokens of the pair.
    shared_logps: Tensor | None = None
    ref_shared_logps: Tensor | None = None
    # Mean over kept tokens of log sum_v pi(v)^2, without gradient.
    collision_logps: Tensor | None = None
    # Sum over the tokens of the row's prompt from the second on, and their number.
    # An example's rows share its prompt: it is scored once, each row holds the sum.
    prompt_logps: Tensor | None = None
    num_prompt_tokens: Tensor | None = None
    # Weight of a row for the prompt it answers; 1 where desirable.
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
        """A field that is known to be filled, by its name."""
        return vars(self)[field_name]

    def select(self, index: Tensor) -> "Rows":
        """The rows at `index`, in that order."""
        values: dict[str, Any] = {
            name: None if value is None else value[index] for name, value in vars(self).items()
        }
        return Rows(**values)


@dataclass(frozen=True)
class Batch:
    """Rows of a micro-batch, or of a whole step, and how they compare.

    `chosen` and `rejected` index into `rows`, one entry per pair; `desirable` marks each row.
    Unpaired data has no pairs; paired data has each chosen row desirable, each rejected row not. Rows of
    a ranked list may be in several pairs, on either side; a loss that reads `desirable` lists it in its needs.
    """

    rows: Rows
    desirable: Tensor
    chosen: Tensor
    rejected: Tensor

    def pairs(self) -> tuple[Rows, Rows]:
        """The chosen and the rejected side, aligned: shape (pairs,)."""
        return self.rows.select(self.chosen), self.rows.select(self.rejected)


@dataclass(frozen=True)
class Step:
    """Facts about the whole optimizer step, over all micro-batches and ranks.

    `kl`: mean policy-minus-reference log-ratio over the step's mismatched rows, not clamped, without
    gradient; None unless the loss needs it. `tokens_per_pair`: mean number of kept chosen tokens in the step.
    `state`: a loss's persistent numbers from earlier steps, see `Loss.next_state`.
    """

    kl: Tensor | None = None
    tokens_per_pair: float = 1.0
    state: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LossOutput:
    """Losses of the units (pairs or rows), implicit rewards of the rows, and native metrics.

    The step's loss is the mean of `losses` over all its units. `rewards` has one entry per row,
    without gradient. `metrics` holds further per-unit values to be averaged, without gradient.
    """

    losses: Tensor
    rewards: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Loss(BaseModel):
    """What every loss declares. Subclasses add fields, a `name` literal and `__call__`.

    Ask an instance for its needs, not the class: those of a mixture follow from its parts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # What one unit is: a (chosen, rejected) pair, or a row that is desirable or not.
    unit: ClassVar[Literal["pair", "row"]] = "pair"
    # Fields of `Rows`, `Batch` and `Step` that the loss reads whatever its options; see `needs`.
    always_needs: ClassVar[frozenset[str]] = frozenset({"ref_logps"})
    # The loss of one unit depends on the other units of the step (ranks, running statistics): it is
    # called once on the whole step, however that is split into micro-batches and ranks.
    whole_step: ClassVar[bool] = False
    # `next_state` does something: the numbers it returns belong in checkpoints.
    keeps_state: ClassVar[bool] = False
    # Training defaults that go with this loss (policies of 1-8B with fp32 master weights).
    learning_rate: ClassVar[float] = 1e-6
    batch_size: ClassVar[int] = 64

    @property
    def needs(self) -> frozenset[str]:
        """Names of the fields of `Rows`, `Batch` and `Step` that this loss reads and that not every loss is given.

        "desirable": each row has to be desirable or not. "weights": the loss honours weights; data with weights
        other than 1 is an error for a loss that does not list them.
        """
        return self.always_needs

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the reference model, so that cache-ref has to run first."""
        return "ref_logps" in self.needs

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """Per-unit losses in nats; pure, no `.item()`, no collective calls."""
        raise NotImplementedError

    def next_state(self, rewards: Tensor, state: dict[str, float]) -> dict[str, float]:
        """State after a step, from all its rewards (detached). Called once a step; saved in checkpoints."""
        return state
