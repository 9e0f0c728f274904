"""DPO for pairs of unequal importance: by the difference of their scores, or by their likelihood under the policy.

In: pairs with reference log-probs, and scores (odpo, rpo) or collision log-probs (wpo). Out: one loss per pair. The
symbols and the options of all three are in `margin.py`.
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
    so the preference of such a pair has loss 0 (the NLL of `sft_weight` stays), and the metric `odpo_dropped` is the
    share of these pairs. With alpha 0 the scores are ignored, no pair is dropped, and the loss is dpo.

    When: every completion has a score on one scale (UltraFeedback's ratings, a reward model).
    Values: alpha 0.5-1, beta 0.1-0.7, f log (paper: beta 0.7 alpha 0.5 on IMDB, 0.05 and 1 on toxicity, 0.5
    on TL;DR).
    """

    name: Literal["odpo"] = "odpo"
    always_needs: ClassVar[frozenset[str]] = MarginLoss.always_needs | {"scores"}
    alpha: NonNegativeFloat = 1.0
    f: Literal["log", "identity", "log1p"] = "log"

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """The negative log-likelihood that the reward margin exceeds its offset, 0 without a positive gap."""
        keeps = self._keeps(chosen, rejected)
        gaps = torch.where(keeps, _gaps(chosen, rejected), 1.0)
        return torch.where(keeps, -logsigmoid(self.beta * margins - self._offsets(gaps)), 0.0)

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per pair."""
        output = super().__call__(batch, step)
        dropped = (~self._keeps(*batch.pairs())).to(output.losses.dtype)
        return LossOutput(output.losses, output.rewards, output.metrics | {"odpo_dropped": dropped})

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


class RPO(MarginLoss):
    """Regresses the margin to the difference of the scores (reward-aware preference optimization).

    Pairs of nearly equal scores keep small margins, and a pair whose rejected completion has the higher score gets a
    negative one. TRL's `rpo_alpha` is another RPO, here `sft_weight`.

    Formula: (paper: arXiv 2502.00203) with z = beta h, t = eta (s_w - s_l), the scores s from the data, and a distance:

    - `backward_kl`: `s(t) log(s(t) / s(z)) + s(-t) log(s(-t) / s(-z))`, the cross-entropy with soft labels
      up to a constant;
    - `forward_kl`: `s(z) log(s(z) / s(t)) + s(-z) log(s(-z) / s(-t))`;
    - `squared`: `(z - t)^2`; with beta 1 the regression of REBEL (arXiv 2404.16767), whose eta is this eta.

    The distances are NeMo-Aligner's `rpo_bwd_kl`, `rpo_fwd_kl` and `rpo_sq`.

    When: every completion has a score on one scale, such as that of a reward model. odpo requires at least an offset,
    rpo exactly the difference.
    Values: eta 1 (NeMo-Aligner's `gt_reward_scale`; eta times a difference of scores is a logit, so scale it to the
    scores), backward_kl; beta and learning rate are dpo's. REBEL: batch 128, learning rate 3e-7 (authors' code).
    """

    name: Literal["rpo"] = "rpo"
    always_needs: ClassVar[frozenset[str]] = MarginLoss.always_needs | {"scores"}
    eta: PositiveFloat = 1.0
    distance: Literal["backward_kl", "forward_kl", "squared"] = "backward_kl"

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """The distance of each reward margin from its target."""
        predicted, target = self.beta * margins, self.eta * _gaps(chosen, rejected)
        match self.distance:
            case "backward_kl":
                return _bernoulli_kl(target, predicted)
            case "forward_kl":
                return _bernoulli_kl(predicted, target)
            case "squared":
                return (predicted - target).square()


def _bernoulli_kl(logits: Tensor, other: Tensor) -> Tensor:
    """KL divergence between two Bernoulli distributions, given their log-odds: (pairs,), nats."""
    log_yes, log_no = logsigmoid(logits), logsigmoid(-logits)
    return log_yes.exp() * (log_yes - logsigmoid(other)) + log_no.exp() * (log_no - logsigmoid(-other))


class WPO(MarginLoss):
    """DPO that weights a pair by the likelihood of both completions under the policy.

    Off-policy data trains on completions that the policy would never generate; the weights simulate on-policy data.

    Formula: the loss of dpo times `min(1, w_w w_l)`, without gradient, where
    `w(y) = exp(mean_t [log pi(y_t) - log sum_v pi(v)^2])`. Paper: arXiv 2406.11827, eq. 2, with its sampled
    alignment (an on-policy token has weight 1 on average).

    The bound of 1 is that of the authors' code (wzhouad/WPO, run_wpo.py). `clamp_weights: false` removes it, as in
    TRL's `use_weighting`. Then the policy's own most likely completions weigh more than 1: the probability of a greedy
    token is never below the expected probability `sum_v pi(v)^2`.

    When: the pairs were written by other models. The scoring engine computes the sum over the vocabulary too.
    Values: beta 0.01, batch 128; learning rate 1e-6 and 2 epochs for Llama-3-8B-Instruct, 5e-7 and 1 epoch for
    Mistral-7B (authors' training_configs).
    """

    name: Literal["wpo"] = "wpo"
    always_needs: ClassVar[frozenset[str]] = MarginLoss.always_needs | {"collision_logps"}
    batch_size: ClassVar[int] = 128
    beta: PositiveFloat = 0.01
    clamp_weights: bool = True

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """The negative log-likelihood of the preference, weighted."""
        weights = _likelihood(chosen) * _likelihood(rejected)
        return (weights.clamp(max=1) if self.clamp_weights else weights) * -logsigmoid(self.beta * margins)


def _likelihood(rows: Rows) -> Tensor:
    assert rows.collision_logps is not None, "collision_logps is not in the needs of the loss"
    return torch.exp(rows.mean_logps.detach() - rows.collision_logps)
