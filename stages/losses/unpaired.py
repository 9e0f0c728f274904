"""Losses of single completions, each desirable or undesirable; a pair counts as one of each.

In: rows with reference log-probs. Out: one loss per row. D is the summed log-ratio of a row, s the logistic
function.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from stages.losses.contract import Batch, Loss, LossOutput, PositiveFloat, Step


class KTO(Loss):
    """Raises desirable and lowers undesirable completions, relative to an estimate of the KL to the reference.

    The value of gains and losses is that of prospect theory. They are measured from a reference point z, the estimate
    of the KL divergence, which is computed from mismatched rows: completions after prompts they do not belong to.

    Formula: desirable `desirable_weight (1 - s(beta (D - z)))`, undesirable `undesirable_weight (1 - s(beta
    (z - D)))`, `z = max(0, mean D of the step's mismatched rows)` without gradient. Paper: arXiv 2402.01306,
    eq. 7 and 8.

    z is one number for the whole optimizer step and all ranks. TRL and HALOs compute it per micro-batch; rlhf-book
    from matched rows, where it is 0 most of the time and the loss becomes apo_zero_unpaired.

    When: each completion has a label of its own (thumbs up or down), or the two labels are unequal in number.
    Values: beta 0.1, learning rate 1e-6 (TRL's guide: not above that at beta 0.1; 5e-7 to 5e-6 are in use),
    batch 64 (HALOs' scripts); weights such that `desirable_weight n_D / (undesirable_weight n_U)` is in [1,
    4/3] (eq. 8).
    """

    name: Literal["kto"] = "kto"
    unit: ClassVar[Literal["pair", "row", "list"]] = "row"
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
    """KTO with the reference point z = 0, so that no mismatched rows are scored.

    On pairs it is half of apo_zero.

    Formula: desirable `desirable_weight (1 - s(beta D))`, undesirable `undesirable_weight s(beta D)`. Paper:
    APO, arXiv 2408.06266, eq. 7, unpaired as in TRL's `apo_zero_unpaired`.

    When: as kto, if a forward pass over mismatched rows in every step costs too much.
    Values: as kto.
    """

    name: Literal["apo_zero_unpaired"] = "apo_zero_unpaired"
    unit: ClassVar[Literal["pair", "row", "list"]] = "row"
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
    """One minus the prospect value of each row, from its log-ratio minus the reference point: (rows,)."""
    gains = loss.beta * distances
    losses = torch.where(
        batch.desirable,
        loss.desirable_weight * torch.sigmoid(-gains),
        loss.undesirable_weight * torch.sigmoid(gains),
    )
    return LossOutput(losses, loss.beta * batch.rows.logratios.detach())


class BCO(Loss):
    """Trains a classifier of good and bad completions whose logit is the reward, shifted by the mean reward.

    The shift by the mean, delta, tightens the upper bound on dpo's loss: a reward counts as good if it is above the
    mean so far.

    Formula: desirable `-log s(r - delta)`, undesirable `-log s(-(r - delta))`, `r = beta D`, delta the mean
    of all rewards of both classes so far, the present step included, without gradient. Paper: arXiv
    2404.04656, section 4.

    delta is updated once for each optimizer step, over all ranks, and is saved in checkpoints. In an evaluation it is
    the mean of the training steps before, 0 before the first. TRL updated it in every micro-batch (and removed its BCO
    trainer); TRL's `bco_pair` has no delta and is another loss.
    `udm` multiplies the losses of undesirable rows by `p / (1 - p)`, clipped to [0.5, 10], where p is the probability
    that a completion of the prompt is desirable: underlying distribution matching (paper, section 4), for data
    whose desirable and undesirable completions have different prompts. TRL computes p from an embedding of the prompt
    by a model, align from its tokens (stages/train/step/density_ratio.py). On pairs the two sides have the same
    prompts, so `udm` is an error there.

    When: as kto, without mismatched rows to score. The metric `delta` is the shift.
    Values: beta 0.1 (paper 0.01-0.1), learning rate as kto's (paper 5e-7 for 7-9B), batch 128 (paper,
    appendix C).
    """

    name: Literal["bco"] = "bco"
    unit: ClassVar[Literal["pair", "row", "list"]] = "row"
    always_needs: ClassVar[frozenset[str]] = frozenset({"ref_logps", "desirable"})
    whole_step: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-6
    batch_size: ClassVar[int] = 128
    beta: PositiveFloat = 0.1
    udm: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """With `udm` also the weights of undesirable rows."""
        return self.always_needs | (frozenset({"density_ratios"}) if self.udm else frozenset())

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per row."""
        rewards = self.beta * batch.rows.logratios
        delta = self._delta(rewards.detach(), step)
        losses = -logsigmoid(torch.where(batch.desirable, rewards - delta, delta - rewards))
        if self.udm:
            assert batch.rows.density_ratios is not None, "density_ratios is not in the needs of the loss"
            losses = losses * batch.rows.density_ratios
        return LossOutput(losses, rewards.detach(), {"delta": delta.expand_as(losses)})

    def _delta(self, rewards: Tensor, step: Step) -> Tensor:
        seen_sum, seen_count = _seen(step.state)
        if step.training:
            return (seen_sum + rewards.sum()) / (seen_count + len(rewards))
        return rewards.new_tensor(seen_sum / max(1.0, seen_count))

    def next_state(self, rewards: Tensor, state: dict[str, float]) -> dict[str, float]:
        """Sum and count of all rewards seen, in double precision."""
        seen_sum, seen_count = _seen(state)
        return {
            "reward_sum": seen_sum + float(rewards.double().sum()),
            "reward_count": seen_count + len(rewards),
        }


def _seen(state: dict[str, float]) -> tuple[float, float]:
    return state.get("reward_sum", 0.0), state.get("reward_count", 0.0)
