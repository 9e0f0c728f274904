"""Losses of single completions, desirable or not; they read pairs too, a pair being one of each.

In: rows with reference log-probs. Out: one loss per row. D is the summed log-ratio of a row, s the logistic
function.
"""

from typing import ClassVar, Literal

import torch
from pydantic import StrictBool
from torch import Tensor
from torch.nn.functional import logsigmoid

from stages.losses.contract import Batch, Loss, LossOutput, PositiveFloat, Step


class KTO(Loss):
    """Raises what people liked and lowers what they did not, with the diminishing returns of prospect theory.

    A completion is good or bad relative to how far the policy has moved in general: the reference point z, an
    estimate of the KL, from completions put behind prompts they do not belong to.

    Formula: desirable `desirable_weight (1 - s(beta (D - z)))`, undesirable `undesirable_weight (1 - s(beta
    (z - D)))`, `z = max(0, mean D of the step's mismatched rows)` without gradient. Paper: arXiv 2402.01306,
    eq. 7 and 8.

    z is one number for the whole optimizer step and all ranks. TRL and HALOs take it per micro-batch;
    rlhf-book takes it from matched rows, which makes it 0 most of the time and the loss apo_zero_unpaired.

    When: thumbs up and down, or unequal numbers of good and bad answers.
    Values: beta 0.1, learning rate 1e-6 (TRL's guide: not above that at beta 0.1; 5e-7 to 5e-6 are in use),
    batch 64 (HALOs' scripts); weights such that `desirable_weight n_D / (undesirable_weight n_U)` is in [1,
    4/3] (eq. 8).
    """

    name: Literal["kto"] = "kto"
    unit: ClassVar[Literal["pair", "row"]] = "row"
    always_needs: ClassVar[frozenset[str]] = frozenset({"ref_logps", "desirable", "kl"})
    learning_rate: ClassVar[float] = 1e-6
    batch_size: ClassVar[int] = 64
    beta: PositiveFloat = 0.1
    desirable_weight: PositiveFloat = 1.0
    undesirable_weight: PositiveFloat = 1.0

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per row."""
        assert step.kl is not None, "kl is not in the needs of the loss"
        return _value_losses(batch, self, batch.rows.logratios - step.kl.clamp(min=0))


class APOZeroUnpaired(Loss):
    """kto whose reference point is the reference itself: z = 0, and no mismatched rows to score.

    On pairs it is half of apo_zero.

    Formula: desirable `desirable_weight (1 - s(beta D))`, undesirable `undesirable_weight s(beta D)`. Paper:
    APO, arXiv 2408.06266, eq. 7, unpaired as in TRL's `apo_zero_unpaired`.

    When: as kto, when a forward over mismatched rows in every step costs too much.
    Values: as kto.
    """

    name: Literal["apo_zero_unpaired"] = "apo_zero_unpaired"
    unit: ClassVar[Literal["pair", "row"]] = "row"
    always_needs: ClassVar[frozenset[str]] = frozenset({"ref_logps", "desirable"})
    learning_rate: ClassVar[float] = 1e-6
    batch_size: ClassVar[int] = 64
    beta: PositiveFloat = 0.1
    desirable_weight: PositiveFloat = 1.0
    undesirable_weight: PositiveFloat = 1.0

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per row."""
        return _value_losses(batch, self, batch.rows.logratios)


def _value_losses(batch: Batch, loss: KTO | APOZeroUnpaired, distances: Tensor) -> LossOutput:
    """One minus the prospect value of each row at its distance from the reference point."""
    gains = loss.beta * distances
    losses = torch.where(
        batch.desirable,
        loss.desirable_weight * torch.sigmoid(-gains),
        loss.undesirable_weight * torch.sigmoid(gains),
    )
    return LossOutput(losses, loss.beta * batch.rows.logratios.detach())


class BCO(Loss):
    """Trains a classifier of good and bad answers whose logit is the reward, shifted by the mean reward.

    The shift delta makes the bound on dpo's loss tight: a reward counts as good when it is above the average
    so far.

    Formula: desirable `-log s(r - delta)`, undesirable `-log s(-(r - delta))`, `r = beta D`, delta the mean
    of all rewards of both classes so far, the present step included, without gradient. Paper: arXiv
    2404.04656, section 4.

    delta is updated once for each optimizer step, over all ranks, and belongs in the checkpoint. TRL updated
    it in every micro-batch (and removed its BCO trainer); TRL's `bco_pair` has no delta and is not this loss.
    `udm` multiplies the losses of undesirable rows by `p / (1 - p)` within [0.5, 10], p the probability that
    an answer to the prompt is desirable: underlying distribution matching (paper, section 4), for data whose
    good and bad answers belong to different prompts. TRL's p reads a model's embedding of the prompt, ours
    its tokens (stages/train/step/density_ratio.py). On pairs all weights are the same, so `udm` is an error there.

    When: as kto, with no mismatched rows to score. The metric `delta` is the shift.
    Values: beta 0.1 (paper 0.01-0.1), learning rate as kto's (paper 5e-7 for 7-9B), batch 128 (paper,
    appendix C).
    """

    name: Literal["bco"] = "bco"
    unit: ClassVar[Literal["pair", "row"]] = "row"
    always_needs: ClassVar[frozenset[str]] = frozenset({"ref_logps", "desirable"})
    whole_step: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-6
    batch_size: ClassVar[int] = 128
    beta: PositiveFloat = 0.1
    udm: StrictBool = False

    @property
    def needs(self) -> frozenset[str]:
        """With `udm` the weights of undesirable rows, too."""
        return self.always_needs | (frozenset({"density_ratios"}) if self.udm else frozenset())

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per row."""
        rewards = self.beta * batch.rows.logratios
        seen_sum, seen_count = _seen(step.state)
        delta = (seen_sum + rewards.detach().sum()) / (seen_count + len(rewards))
        losses = -logsigmoid(torch.where(batch.desirable, rewards - delta, delta - rewards))
        if self.udm:
            assert batch.rows.density_ratios is not None, "density_ratios is not in the needs of the loss"
            losses = losses * batch.rows.density_ratios
        return LossOutput(losses, rewards.detach(), {"delta": delta.expand_as(losses)})

    def next_state(self, rewards: Tensor, state: dict[str, float]) -> dict[str, float]:
        """Sum and count of all rewards seen, in double precision."""
        seen_sum, seen_count = _seen(state)
        return {
            "reward_sum": seen_sum + float(rewards.double().sum()),
            "reward_count": seen_count + len(rewards),
        }


def _seen(state: dict[str, float]) -> tuple[float, float]:
    return state.get("reward_sum", 0.0), state.get("reward_count", 0.0)
