"""Losses with a target for each side of a pair, not only for the difference between the two.

In: pairs with reference log-probs. Out: one loss per pair. dpo fixes only the difference, so both log-probs
may fall together; these losses fix the chosen and the rejected log-prob each. Symbols as in `margin.py`.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from stages.losses.contract import Batch, Loss, LossOutput, PositiveFloat, Step


class NCA(Loss):
    """Raises the chosen log-ratio itself, not only its margin over the rejected (noise-contrastive alignment).

    A term of weight one half on each side holds both near the reference, so the chosen does not fall.

    Formula: `-log s(beta D_w) - log s(-beta D_w) / 2 - log s(-beta D_l) / 2`. Paper: arXiv 2402.05369,
    section 4.1.

    When: dpo lowers the probability of the chosen completions, as often in reasoning and maths.
    Values: beta 0.01, learning rate 1e-6 (the paper's 5e-6 is for QLoRA), batch 32 (paper, appendix C).
    """

    name: Literal["nca"] = "nca"
    learning_rate: ClassVar[float] = 1e-6
    batch_size: ClassVar[int] = 32
    beta: PositiveFloat = 0.01

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per pair."""
        chosen, rejected, rewards = _rewards(batch, self.beta)
        losses = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
        return LossOutput(losses, rewards)


class SPPO(Loss):
    """Regresses the chosen log-ratio to +1/(2 beta) and the rejected one to -1/(2 beta).

    One round of self-play preference optimization: the target of a log-ratio is (win rate - 1/2) / beta. Here win
    rates are 1 for the chosen and 0 for the rejected completion, as in TRL's `sppo_hard`.

    Formula: `(D_w - 1/(2 beta))^2 + (D_l + 1/(2 beta))^2`. Paper: arXiv 2405.00675, eq. 4.7 with P in {0, 1}.
    The authors' code takes half the sum, and estimated win rates; TRL the sum, as here.

    When: the pairs are samples of the policy itself, and training goes in rounds.
    Values: beta 1e-3 (eta 1e3), learning rate 5e-7, batch 64, one epoch a round with RMSprop (authors' pipeline.sh;
    `train.optimizer: rmsprop`). The loss begins at 1/(2 beta^2), which is 500,000: gradients are large, and every step
    is clipped, so the factor of two changes nothing.
    """

    name: Literal["sppo"] = "sppo"
    learning_rate: ClassVar[float] = 5e-7
    beta: PositiveFloat = 1e-3

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per pair."""
        chosen, rejected = batch.pairs()
        target = 1 / (2 * self.beta)
        losses = (chosen.logratios - target).square() + (rejected.logratios + target).square()
        return LossOutput(losses, self.beta * batch.rows.logratios.detach())


class CalDPO(Loss):
    """DPO plus a regression of both log-ratios to +1/(2 beta) and -1/(2 beta) (calibrated DPO).

    The regression keeps the chosen log-prob from falling: it gives the rewards the scale of a ground truth of 1/2 for
    the chosen and -1/2 for the rejected completion.

    Formula: `-log s(h) + (D_w - 1/(2 beta))^2 + (D_l + 1/(2 beta))^2`: dpo with beta 1 and sppo. Paper: arXiv
    2412.14516; authors' code, Cal-DPO/Cal-DPO.

    When: dpo lowers the probability of the chosen completions.
    Values: beta 1e-3 (authors' Mistral-7B and TL;DR; also 3e-3, and 0.1 for HH), learning rate 5e-7, with RMSprop. At
    this beta the squares are far larger than the logistic term, and every step is clipped.
    """

    name: Literal["cal_dpo"] = "cal_dpo"
    learning_rate: ClassVar[float] = 5e-7
    beta: PositiveFloat = 1e-3

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per pair."""
        chosen, rejected = (rows.logratios for rows in batch.pairs())
        target = 1 / (2 * self.beta)
        calibration = (chosen - target).square() + (rejected + target).square()
        return LossOutput(
            calibration - logsigmoid(chosen - rejected), self.beta * batch.rows.logratios.detach()
        )


class APOZero(Loss):
    """Raises the chosen and lowers the rejected completion, each against the reference.

    For data whose chosen completions are better than the policy's own.

    Formula: `1 - s(beta D_w) + s(beta D_l)`. Paper: APO, arXiv 2408.06266, eq. 7. rlhf-book leaves out the 1.
    `normalize: mean` takes d = D / n for D, so that a long completion moves no further than a short one, as the
    length-normalised objectives of LFM2 do (arXiv 2511.23404); the default is the paper's sum.

    When: the chosen completions come from a stronger model. apo_zero_unpaired is the same for unpaired data.
    Values: beta 0.05-0.1 (SmolLM3 0.05, paper 0.1); under `mean` larger, as a mean is smaller than a sum (dpo_norm
    takes 5); learning rate 1e-6 (SmolLM3 3B; the paper's 2e-7 is for 8B).
    """

    name: Literal["apo_zero"] = "apo_zero"
    learning_rate: ClassVar[float] = 1e-6
    beta: PositiveFloat = 0.1
    normalize: Literal["sum", "mean"] = "sum"

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per pair."""
        chosen, rejected, rewards = _rewards(batch, self.beta, self.normalize)
        return LossOutput(torch.sigmoid(-chosen) + torch.sigmoid(rejected), rewards)


class APODown(Loss):
    """Lowers both completions, the rejected one more: for a policy that is better than its data.

    For data whose chosen completions are worse than the policy's own: their order is worth learning, but neither
    is worth imitating.

    Formula: `s(beta D_w) + 1 - s(beta h)`. Paper: APO, arXiv 2408.06266, eq. 8. rlhf-book leaves out the 1.
    `normalize: mean` as in apo_zero, h being the difference of the d = D / n.

    When: the policy is stronger than the models that wrote the data.
    Values: beta 0.1 (paper); learning rate 1e-6 for 1-3B as apo_zero's (the paper's 2e-7 is for 8B).
    """

    name: Literal["apo_down"] = "apo_down"
    learning_rate: ClassVar[float] = 1e-6
    beta: PositiveFloat = 0.1
    normalize: Literal["sum", "mean"] = "sum"

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per pair."""
        chosen, rejected, rewards = _rewards(batch, self.beta, self.normalize)
        return LossOutput(torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen), rewards)


def _rewards(batch: Batch, beta: float, normalize: str = "sum") -> tuple[Tensor, Tensor, Tensor]:
    """Chosen and rejected scores, (pairs,) each, with gradient; rewards of all rows, (rows,), without."""
    rewards = beta * batch.rows.logratios
    scores = rewards / batch.rows.num_tokens if normalize == "mean" else rewards
    return scores[batch.chosen], scores[batch.rejected], rewards.detach()
