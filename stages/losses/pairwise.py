"""DPO and its variants: each turns the margin of a pair into a loss.

In: pairs with reference log-probs. Out: one loss per pair. The symbols (h, d, s, ...) and the options that
all of these losses take (ld_alpha, sft_weight, f_divergence, weights) are in `margin.py`.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from stages.losses.contract import Batch, Loss, LossOutput, NonNegativeFloat, PositiveFloat, Rows, Step
from stages.losses.margin import MarginLoss
from stages.losses.numerics import expm1


class DPO(MarginLoss):
    """Makes the chosen completion likelier than the rejected one, measured against the reference.

    The logistic loss of a Bradley-Terry model whose rewards are beta times the log-ratios. The gradient of a pair
    vanishes as its margin grows.

    Formula: `-log s(beta h)`. Paper: arXiv 2305.18290, eq. 7.

    When: as the first loss to try on paired data.
    Values: beta 0.1 (the paper; 0.01 for Zephyr and SimPO's 7-9B baselines, 0.5 for SmolLM2 1.7B and below);
    the best beta differs from model to model, so a sweep pays.
    """

    name: Literal["dpo"] = "dpo"

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """The negative log-likelihood of the preference."""
        return -logsigmoid(self.beta * margins)


class CDPO(MarginLoss):
    """DPO with smoothed labels: a share of them is taken to be wrong, so the margin has a finite optimum.

    The loss has its minimum at `beta h = log((1 - eps) / eps)` and rises again beyond it.

    Formula: `-(1 - eps) log s(beta h) - eps log s(-beta h)` with eps = `label_smoothing`. Source: E.
    Mitchell, "A note on DPO with noisy preferences and relationship to IPO" (2023), eq. 3.

    When: labels are noisy and margins grow too far. rdpo removes the bias of the noise; this loss bounds the margin.
    Values: eps 0.1 (rlhf-book; HALOs 0.2). TRL's DPOTrainer dropped this loss: it accepts
    `label_smoothing` for `sigmoid` and ignores it.
    """

    name: Literal["cdpo"] = "cdpo"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.1

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """Cross-entropy with smoothed labels."""
        z = self.beta * margins
        return -(1 - self.label_smoothing) * logsigmoid(z) - self.label_smoothing * logsigmoid(-z)


class RDPO(MarginLoss):
    """DPO corrected for label noise: its mean over flipped labels is the loss of DPO on clean ones.

    This holds if each label was flipped with probability eps, independently. Called `robust` in TRL.

    Formula: `[-(1 - eps) log s(beta h) + eps log s(-beta h)] / (1 - 2 eps)` with eps = `label_smoothing`.
    Paper: arXiv 2403.00409 (Provably Robust DPO), section 3.1. rlhf-book's README links this paper under the
    name ODPO by mistake; ODPO is arXiv 2402.10571 and is the loss `odpo`.

    When: the rate of flipped labels is known. The loss has no lower bound as the margin of a pair grows.
    Values: beta 0.1, eps 0.1 (section 6).
    """

    name: Literal["rdpo"] = "rdpo"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.1

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """The unbiased estimate of the loss on clean labels."""
        z = self.beta * margins
        eps = self.label_smoothing
        return (-(1 - eps) * logsigmoid(z) + eps * logsigmoid(-z)) / (1 - 2 * eps)


class DPONorm(MarginLoss):
    """DPO on log-ratios per token, so that a long completion counts no more than a short one.

    Called `sigmoid_norm` in TRL.

    Formula: `-log s(beta (d_w - d_l))`. Paper: Tulu 3, arXiv 2411.15124, section 5.

    When: lengths differ a lot, or completions grow longer under dpo.
    Values: beta 5, because a mean is smaller than a sum (Tulu 3, OLMo 2 and 3; rlhf-book 2; TRL's default is 0.1,
    which hardly trains). Rewards are reported as beta times the summed log-ratio, as TRL does; rlhf-book reports
    the mean.
    """

    name: Literal["dpo_norm"] = "dpo_norm"
    # OLMo 2 7B in open-instruct; Tulu 3 8B takes 5e-7. Both with batches of 128.
    learning_rate: ClassVar[float] = 1e-6
    batch_size: ClassVar[int] = 128
    beta: PositiveFloat = 5.0

    @property
    def divides_by_length(self) -> bool:
        """Always: this is the difference from dpo."""
        return True

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """The negative log-likelihood of the preference."""
        return -logsigmoid(self.beta * margins)


class DPOP(MarginLoss):
    """DPO with a penalty on the margin when the chosen log-ratio falls below 0 (DPO-Positive).

    The loss of dpo also falls when both completions become less likely, the rejected one more. The penalty keeps the
    chosen completion at least as likely as under the reference. The Smaug models were trained with it.

    Formula: `-log s(beta (h - dpop_lambda max(0, -D_w)))`. Paper: arXiv 2402.13228, version of July 2024; earlier
    versions had the penalty outside of beta by mistake (authors, abacusai/smaug #2).

    When: the completions of a pair differ in few tokens, as in maths, where dpo lowers both the most.
    Values: dpop_lambda 50 (paper; results hardly differ from 5 to 500, say its authors); beta and learning rate are
    dpo's.
    """

    name: Literal["dpop"] = "dpop"
    dpop_lambda: NonNegativeFloat = 50.0

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """The negative log-likelihood of the preference, with the penalty on the margin."""
        penalties = torch.relu(-self._logratios(chosen))
        return -logsigmoid(self.beta * (margins - self.dpop_lambda * penalties))


class IPO(MarginLoss):
    """Regresses the margin to a finite target, where DPO pushes it without bound.

    So even labels without noise do not drive the policy away from the reference. `beta` is the paper's tau.

    Formula: `(x - 1 / (2 beta))^2`. Paper: arXiv 2310.12036, eq. 17.

    Papers and code disagree on x, so `normalize` has both. `mean`: `x = d_w - d_l`, per token, as in TRL, HALOs and
    LLaMA-Factory, and according to its authors in the paper's own results (TRL #1265). `sum`: `x = h`, as eq. 17
    reads, and as in rlhf-book, eric-mitchell/DPO and OpenRLHF.

    When: labels are few or clean, and margins grow too far under dpo.
    Values: beta 0.1. The target is then 5 nats, under `mean` 5 nats per token, which is never reached: the loss is
    nearly linear, and a beta of 0.01-0.1 acts mostly like a factor of the learning rate. Under `sum` the target is
    within the spread of the margins, and training hardly moves (docs/losses.md).
    """

    name: Literal["ipo"] = "ipo"
    normalize: Literal["mean", "sum"] = "mean"

    @property
    def divides_by_length(self) -> bool:
        """With `normalize: mean`."""
        return self.normalize == "mean"

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """Squared distance of the margin from its target."""
        return (margins - 1 / (2 * self.beta)).square()


class Hinge(MarginLoss):
    """Hinge loss on the margin: a pair has no gradient once its margin reaches 1 / beta.

    The loss of SLiC with log-ratios in place of log-probs, as RSO uses it.

    Formula: `max(0, 1 - beta h)`. Papers: RSO, arXiv 2309.06657, table 1 (`hinge-norm`); SLiC-HF, arXiv
    2305.10425.

    When: pairs that are already well separated should no longer move the policy.
    Values: beta 0.05 (RSO); the learning rate is that of dpo, because the papers' rates are for T5.
    """

    name: Literal["hinge"] = "hinge"
    beta: PositiveFloat = 0.05

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """Linear below the target margin, zero beyond it."""
        return torch.relu(1 - self.beta * margins)


class EXO(MarginLoss):
    """Fits the policy to the preference by the reverse KL, the direction that reinforcement learning uses.

    dpo is mass-covering: it spreads over all modes of the preference distribution. This loss is mode-seeking.

    Formula: `s(z) [log s(z) - log(1 - eps)] + s(-z) [log s(-z) - log eps]`, z = beta h, eps =
    `label_smoothing` > 0. Paper: arXiv 2402.00856, eq. 16.

    When: the completions are samples of the reference, with one good completion among many poor ones. exo_rw is the
    same for ranked lists with scores.
    Values: beta 0.5 on HH and TL;DR, 0.1 on IMDB; eps e^-10 = 4.54e-5; learning rate 1e-6, batch 64 (authors' code,
    haozheji/exact-optimization, which also divides the logits by a temperature of 0.8). TRL: eps 1e-3.
    """

    name: Literal["exo"] = "exo"
    beta: PositiveFloat = 0.5
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = 4.54e-5

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """KL from the policy's preference to the smoothed label."""
        log_win, log_lose = logsigmoid(self.beta * margins), logsigmoid(-self.beta * margins)
        eps = self.label_smoothing
        return log_win.exp() * (log_win - math.log1p(-eps)) + log_lose.exp() * (log_lose - math.log(eps))


class ChiPO(Loss):
    """DPO with a chi-squared divergence added to the KL, so that the reward also grows with the ratio itself.

    A completion that the policy makes far likelier than the reference already has a large reward, so the policy does
    not overfit to it.

    Formula: `-log s(beta (phi_w - phi_l))`, `phi = e^D + D`, the derivative of `(u - 1)^2 / 2 + u log u` at u = e^D.
    Paper: chi-squared preference optimization, arXiv 2407.13399, algorithm 1. The paper clips the difference of
    the rewards at twice the largest reward, where the gradient is 0; here e^D is continued by its tangent beyond D = 20.

    When: dpo overfits, as in long training or with a small beta. Far below the reference the loss is that of dpo.
    Values: beta and learning rate are dpo's; at the reference the gradient is twice that of dpo.
    """

    name: Literal["chipo"] = "chipo"
    beta: PositiveFloat = 0.1

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per pair."""
        logratios = batch.rows.logratios
        links = logratios + expm1(logratios)
        losses = -logsigmoid(self.beta * (links[batch.chosen] - links[batch.rejected]))
        return LossOutput(losses, self.beta * logratios.detach())


class DiscoPOP(MarginLoss):
    """A loss found by a language model: logistic for pairs in the wrong order, exponential for the others.

    A sigmoid gate of width tau blends the two; the blend is not convex just above zero.

    Formula: `(1 - m) (-log s(z)) + m e^-z`, z = beta h, m = s(z / tau). Paper: arXiv 2406.08414, eq. 5.

    When: as an alternative to dpo on clean labels; the paper reports gains on chat and summaries.
    Values: beta 0.05, tau 0.05, learning rate 5e-7, batch 64 (appendices B.1 and E).
    """

    name: Literal["discopop"] = "discopop"
    learning_rate: ClassVar[float] = 5e-7
    beta: PositiveFloat = 0.05
    tau: Annotated[float, Field(gt=0, le=1)] = 0.05

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """The gated blend of the two losses."""
        z = self.beta * margins
        logistic = torch.sigmoid(-z / self.tau) * -logsigmoid(z)
        # `m e^-z` as one exponential: `e^-z` alone overflows where m is nearly 0.
        exponential = torch.exp(logsigmoid(z / self.tau) - z)
        return logistic + exponential
