"""DPO for pairs of unequal importance: by the difference of their scores, or by their likelihood under the policy.

In: pairs with reference log-probs, and scores (odpo) or collision log-probs (wpo). Out: one loss per pair. The
symbols and the options of both losses are in `margin.py`.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from stages.losses.contract import Batch, LossOutput, NonNegativeFloat, PositiveFloat, Rows, Step
from stages.losses.margin import MarginLoss


class ODPO(MarginLoss):
    """DPO with an offset: the required margin grows with the difference of the scores.

    A pair with scores 9 and 1 needs a larger margin than one with scores 6 and 5.

    Formula: `-log s(beta h - alpha f(s_w - s_l))`, the scores s from the data, `f` one of log, identity,
    log1p. Paper: ODPO, arXiv 2402.10571, section 3. rlhf-book's README names ODPO but links arXiv
    2403.00409, which is Provably Robust DPO: that is the loss `rdpo`.

    With `f: log` the offset of a gap below 1 is negative, as in the paper. For a gap <= 0 the offset is not defined,
    so such a pair has loss 0, and the metric `odpo_dropped` is the share of these pairs. With alpha 0 the scores are
    ignored, no pair is dropped, and the loss is dpo.

    When: every completion has a score on one scale (UltraFeedback's ratings, a reward model).
    Values: alpha 0.5-1, beta 0.1-0.7, f log (paper: beta 0.7 alpha 0.5 on IMDB, 0.05 and 1 on toxicity, 0.5
    on TL;DR).
    """

    name: Literal["odpo"] = "odpo"
    always_needs: ClassVar[frozenset[str]] = MarginLoss.always_needs | {"scores"}
    alpha: NonNegativeFloat = 1.0
    f: Literal["log", "identity", "log1p"] = "log"

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """The negative log-likelihood that the reward margin exceeds its offset."""
        gaps = torch.where(self._keeps(chosen, rejected), _gaps(chosen, rejected), 1.0)
        return -logsigmoid(self.beta * margins - self._offsets(gaps))

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per pair, 0 for a pair without a positive gap."""
        output = super().__call__(batch, step)
        keeps = self._keeps(*batch.pairs())
        losses = torch.where(keeps, output.losses, 0.0)
        dropped = (~keeps).to(output.losses.dtype)
        return LossOutput(losses, output.rewards, output.metrics | {"odpo_dropped": dropped})

    def _keeps(self, chosen: Rows, rejected: Rows) -> Tensor:
        gaps = _gaps(chosen, rejected)
        return gaps > 0 if self.alpha else torch.ones_like(gaps, dtype=torch.bool)

    def _offsets(self, gaps: Tensor) -> Tensor:
        if self.alpha == 0:
            return torch.zeros_like(gaps)
        match self.f:
            case "log":
                return self.alpha * gaps.log()
            case "identity":
                return self.alpha * gaps
            case "log1p":
                return self.alpha * gaps.log1p()


def _gaps(chosen: Rows, rejected: Rows) -> Tensor:
    assert chosen.scores is not None, "scores is not in the needs of the loss"
    assert rejected.scores is not None, "scores is not in the needs of the loss"
    return chosen.scores - rejected.scores


class WPO(MarginLoss):
    """DPO that weights a pair by the likelihood of both completions under the policy.

    Off-policy data trains on completions that the policy would never generate; the weights simulate on-policy data.

    Formula: the loss of dpo times `w_w w_l`, without gradient, where
    `w(y) = exp(mean_t [log pi(y_t) - log sum_v pi(v)^2])`. Paper: arXiv 2406.11827, eq. 2, with its sampled
    alignment (an on-policy token has weight 1 on average), as in TRL's `use_weighting`.

    When: the pairs were written by other models. The scoring engine computes the sum over the vocabulary too.
    Values: beta 0.01 (the paper).
    """

    name: Literal["wpo"] = "wpo"
    always_needs: ClassVar[frozenset[str]] = MarginLoss.always_needs | {"collision_logps"}
    beta: PositiveFloat = 0.01

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """The negative log-likelihood of the preference, weighted."""
        return _likelihood(chosen) * _likelihood(rejected) * -logsigmoid(self.beta * margins)


def _likelihood(rows: Rows) -> Tensor:
    assert rows.collision_logps is not None, "collision_logps is not in the needs of the loss"
    return torch.exp(rows.mean_logps.detach() - rows.collision_logps)
