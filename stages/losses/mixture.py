"""A weighted sum of other losses on the same pairs.

In: pairs, with everything that the parts need. Out: one loss per pair.
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
    """A weighted sum of other losses on the same pairs, as in MPO.

    Formula: `sum_k weight_k loss_k`. A loss of single completions counts `(l_w + l_l) / 2` for a pair, its
    mean over the two rows.

    The best known mixture is MPO (arXiv 2411.10442). The authors' code (OpenGVLab/InternVL, trainer_dpo.py) adds 0.8
    dpo, 0.2 times the sum of bco's two sides, and the NLL per token of each chosen completion. That is `bco` with
    weight 0.4 and `dpo` with weight 0.8 and `sft_weight` 1.25 (0.8 x 1.25 = 1), as in configs/mixture.yaml. A part
    `sft` of weight 1 averages over all tokens of the step instead. TRL writes MPO with `loss_type` and `loss_weights`;
    its `bco_pair` is the sum of both sides, without the shift.

    The reported rewards are those of the first part. A part that keeps a running state learns it from the reported
    rewards, so it has to be the first. The metrics and the unweighted loss of each part are reported as
    `<part>/<metric>`.

    When: dpo alone lets the chosen log-probs fall (dpo + sft), or two losses complement each other.
    Values: those of the parts. MPO: weights as above, beta 0.1, batch 256; learning rate 5e-6 for InternVL2-8B,
    1e-6 for InternVL2.5, 2e-7 for InternVL3 (authors' shell scripts).
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
            raise ValueError(f"has the same loss twice: {', '.join(names)}; add up the weights in one part")
        for part in parts:
            if part.loss.unit == "list":
                raise ValueError(
                    f"has {part.loss.name}, a loss of ranked lists; the parts of a mixture are losses of pairs"
                )
        for part in parts[1:]:
            if part.loss.keeps_state:
                raise ValueError(
                    f"has {part.loss.name}, which keeps a running state, in a later place; put it first"
                )
        return parts

    @property
    def needs(self) -> frozenset[str]:
        """Everything that a part needs; weights only if every part honours them, or half of a loss would be weighted."""
        needs = [part.loss.needs for part in self.parts]
        return frozenset.union(*needs) - {"weights"} | (frozenset.intersection(*needs) & {"weights"})

    @property
    def whole_step(self) -> bool:  # pyrefly: ignore[bad-override]
        """Whether a part has to be called on the whole step."""
        return any(part.loss.whole_step for part in self.parts)

    @property
    def keeps_state(self) -> bool:  # pyrefly: ignore[bad-override]
        """Whether the first part keeps state; no other part may."""
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
    """One value for each pair, (pairs,), from the values of a loss's units: (pairs,) or (rows,)."""
    if loss.unit == "pair":
        return values
    return (values[batch.chosen] + values[batch.rejected]) / 2
