"""DPO for pairs that do not count alike: by how much better the chosen is, or how likely the policy finds both.

In: pairs with reference log-probs, and scores (odpo) or vocabulary sums (wpo). Out: one loss per pair. The
symbols and the options that both take are in `margin.py`.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from stages.losses.contract import Batch, LossOutput, NonNegativeFloat, PositiveFloat, Rows, Step
from stages.losses.margin import MarginLoss


class ODPO(MarginLoss):
    """DPO that asks for a margin as large as the chosen completion is better.

    A pair a judge scored 9 to 1 should be told apart further than one scored 6 to 5.

    Formula: `-log s(beta h - alpha f(s_w - s_l))`, the scores s from the data, `f` one of log, identity,
    log1p. Paper: ODPO, arXiv 2402.10571, section 3. rlhf-book's README asks for ODPO but links arXiv
    2403.00409, which is Provably Robust DPO: that is the loss `rdpo`.

    With `f: log` a gap below 1 asks for less than dpo does, down to a negative margin: that is the paper's
    choice. An offset of a gap <= 0 has no meaning, so such a pair has loss 0, and the metric `odpo_dropped`
    is the share of these pairs. With alpha 0 scores do not matter, nothing is dropped and this is dpo.

    When: every completion has a score on one scale (UltraFeedback's ratings, a reward model).
    Values: alpha 0.5-1, beta 0.1-0.7, f log (paper: beta 0.7 alpha 0.5 on IMDB, 0.05 and 1 on toxicity, 0.5
    on TL;DR).
    """

    name: Literal["odpo"] = "odpo"
    always_needs: ClassVar[frozenset[str]] = MarginLoss.always_needs | {"scores"}
    alpha: NonNegativeFloat = 1.0
    f: Literal["log", "identity", "log1p"] = "log"

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """The negative log-likelihood that the margin exceeds its offset."""
        gaps = torch.where(self._keeps(chosen, rejected), _gaps(chosen, rejected), 1.0)
        return -logsigmoid(self.beta * margins - self._offsets(gaps))

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per pair, 0 for those without a positive gap."""
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
    """DPO that lets a pair count as much as the policy would have said it itself.

    Off-policy data pulls towards completions the policy never makes; weighting by their likelihood under the
    policy simulates on-policy data.

    Formula: the loss of dpo times `w_w w_l`, without gradient, where
    `w(y) = exp(mean_t [log pi(y_t) - log sum_v pi(v)^2])`. Paper: arXiv 2406.11827, eq. 2, with its sampled
    alignment (an on-policy token has weight 1 on average), as in TRL's `use_weighting`.

    When: pairs were written by other models. It needs the vocabulary sum from the scorer.
    Values: beta 0.01 (the paper).
    """

    name: Literal["wpo"] = "wpo"
    always_needs: ClassVar[frozenset[str]] = MarginLoss.always_needs | {"collision_logps"}
    beta: PositiveFloat = 0.01

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """Weighted negative log-likelihood of the preference."""
        return _likelihood(chosen) * _likelihood(rejected) * -logsigmoid(self.beta * margins)


def _likelihood(rows: Rows) -> Tensor:
    assert rows.collision_logps is not None, "collision_logps is not in the needs of the loss"
    return torch.exp(rows.mean_logps.detach() - rows.collision_logps)
