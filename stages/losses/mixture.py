"""A weighted sum of other losses on the same pairs.

In: pairs, with whatever the parts need. Out: one loss per pair.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, field_validator
from torch import Tensor

from stages.losses.contract import Batch, Loss, LossOutput, PositiveFloat, Step

if TYPE_CHECKING:
    from stages.losses import SingleLoss


class Part(BaseModel):
    """One loss of a mixture, with its own hyperparameters, and its weight."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weight: PositiveFloat = 1.0
    loss: "SingleLoss"


class Mixture(Loss):
    """Several losses at once: one for the order of a pair, one for each side of it, one for imitation.

    Formula: `sum_k weight_k loss_k`. A loss of single completions counts `(l_w + l_l) / 2` for a pair, its
    mean over rows. The best known is MPO (arXiv 2411.10442): dpo 0.8, bco 0.2, sft 1. TRL writes it as
    `loss_type` and `loss_weights`, with its `bco_pair`, the sum of both sides: twice our bco, and without its
    shift.

    The first part is the main one: the rewards reported are its rewards. A part that keeps a running state
    learns it from the reported rewards, so it has to come first. Metrics, and each part's unweighted loss,
    are reported as `<part>/<metric>`.

    When: dpo alone lets the chosen log-probs fall (dpo + sft), or one loss is strong where another is weak.
    Values: those of the parts; MPO's weights are above.
    """

    name: Literal["mixture"] = "mixture"
    parts: tuple[Part, ...]

    @field_validator("parts")
    @classmethod
    def _parts_fit_together(cls, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        if not parts:
            raise ValueError("is empty; a mixture has at least one part")
        names = [part.loss.name for part in parts]
        if len(set(names)) < len(names):
            raise ValueError(f"has a loss twice: {', '.join(names)}; add up their weights in one part")
        for part in parts[1:]:
            if part.loss.keeps_state:
                raise ValueError(
                    f"has {part.loss.name} in a later place; it keeps a running state and must be first"
                )
        return parts

    @property
    def needs(self) -> frozenset[str]:
        """What any part needs; weights only where every part takes them, or a pair's weight would count by halves."""
        needs = [part.loss.needs for part in self.parts]
        return frozenset.union(*needs) - {"weights"} | (frozenset.intersection(*needs) & {"weights"})

    @property
    def whole_step(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether any part has to see the whole step."""
        return any(part.loss.whole_step for part in self.parts)

    @property
    def keeps_state(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the first part keeps state; no other can."""
        return self.parts[0].loss.keeps_state

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per pair."""
        outputs = [part.loss(batch, step) for part in self.parts]
        losses = outputs[0].losses.new_zeros(len(batch.chosen))
        metrics = {}
        for part, output in zip(self.parts, outputs, strict=True):
            part_losses = _per_pair(part.loss, output.losses, batch)
            losses = losses + part.weight * part_losses
            metrics[f"{part.loss.name}/loss"] = part_losses.detach()
            for key, values in output.metrics.items():
                metrics[f"{part.loss.name}/{key}"] = _per_pair(part.loss, values, batch)
        return LossOutput(losses, outputs[0].rewards, metrics)

    def next_state(self, rewards: Tensor, state: dict[str, float]) -> dict[str, float]:
        """The first part's state."""
        return self.parts[0].loss.next_state(rewards, state)


def _per_pair(loss: Loss, values: Tensor, batch: Batch) -> Tensor:
    """Values of a loss's units as values of pairs."""
    if loss.unit == "pair":
        return values
    return (values[batch.chosen] + values[batch.rejected]) / 2
