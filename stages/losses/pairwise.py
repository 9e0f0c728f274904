"""DPO and its relatives: each turns the margin of a pair into a loss.

In: pairs with reference log-probs. Out: one loss per pair. The symbols (h, d, s, ...) and the options that
all of these take (ld_alpha, sft_weight, f_divergence, weights) are in `margin.py`.
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

    The logistic loss of a Bradley-Terry model whose rewards are beta times the log-ratios: pairs already
    told apart stop pulling.

    Formula: `-log s(beta h)`. Paper: arXiv 2305.18290, eq. 7.

    When: the place to start with paired data.
    Values: beta 0.1 (the paper; 0.01 for Zephyr and SimPO's 7-9B baselines, 0.5 for SmolLM2 1.7B and below);
    the best beta differs from model to model, so sweep it.
    """

    name: Literal["dpo"] = "dpo"

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """The negative log-likelihood of the preference."""
        return -logsigmoid(self.beta * margins)


class CDPO(MarginLoss):
    """DPO that believes a share of the labels to be wrong way round, so it never asks for certainty.

    The loss has its minimum at `beta h = log((1 - eps) / eps)` and rises again beyond it.

    Formula: `-(1 - eps) log s(beta h) - eps log s(-beta h)` with eps = `label_smoothing`. Source: E.
    Mitchell, "A note on DPO with noisy preferences and relationship to IPO" (2023), eq. 3.

    When: labels are noisy and runs overshoot. rdpo removes the bias of the noise, this one adds a brake.
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
    """DPO on flipped labels, corrected so that its mean is DPO's on the clean ones.

    If a share eps of the labels was flipped at random, the expectation of this loss is that of DPO without
    the flips. Called `robust` in TRL.

    Formula: `[-(1 - eps) log s(beta h) + eps log s(-beta h)] / (1 - 2 eps)` with eps = `label_smoothing`.
    Paper: arXiv 2403.00409 (Provably Robust DPO), section 3.1. rlhf-book's README links this paper under the
    name ODPO by mistake; ODPO is arXiv 2402.10571 and is the loss `odpo`.

    When: the rate of flipped labels is known. The loss is unbounded below on pairs told apart.
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
    """DPO on log-ratios per token, so that a long completion weighs no more than a short one.

    Called `sigmoid_norm` in TRL.

    Formula: `-log s(beta (d_w - d_l))`. Paper: Tulu 3, arXiv 2411.15124, section 5.

    When: lengths differ a lot, or answers grow longer under dpo.
    Values: beta 5, because a mean is smaller than a sum (Tulu 3, OLMo 2 and 3; rlhf-book 2; TRL leaves 0.1,
    which hardly moves). Rewards are reported as beta times the summed log-ratio, as TRL does; rlhf-book reports
    the mean.
    """

    name: Literal["dpo_norm"] = "dpo_norm"
    # OLMo 2 7B in open-instruct; Tulu 3 8B takes 5e-7. Both with batches of 128.
    learning_rate: ClassVar[float] = 1e-6
    batch_size: ClassVar[int] = 128
    beta: PositiveFloat = 5.0

    @property
    def divides_by_length(self) -> bool:
        """This is the point of it."""
        return True

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """The negative log-likelihood of the preference."""
        return -logsigmoid(self.beta * margins)


class DPOP(MarginLoss):
    """DPO that takes back from the margin what the chosen completion has lost against the reference.

    dpo is content when both completions become unlikelier, the rejected one more; here a chosen log-ratio below
    0 makes the pair count as not yet told apart. DPO-Positive, of the Smaug models.

    Formula: `-log s(beta (h - dpop_lambda max(0, -D_w)))`. Paper: arXiv 2402.13228, as of its version of July
    2024; before, the penalty stood outside of beta by mistake (authors, abacusai/smaug #2).

    When: the completions of a pair differ in few tokens, as in maths, where dpo lowers both the most.
    Values: dpop_lambda 50 (paper; its authors found 5 to 500 alike); beta and learning rate are dpo's.
    """

    name: Literal["dpop"] = "dpop"
    dpop_lambda: NonNegativeFloat = 50.0

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """The negative log-likelihood of the preference, less the loss of the chosen completion."""
        lost = torch.relu(-self._logratios(chosen))
        return -logsigmoid(self.beta * (margins - self.dpop_lambda * lost))


class IPO(MarginLoss):
    """Regresses the margin to a finite target instead of pushing it for ever.

    Without a logistic curve there is nothing to saturate, so deterministic labels do not drive the policy
    away from the reference. `beta` is the paper's tau.

    Formula: `(x - 1 / (2 beta))^2`. Paper: arXiv 2310.12036, eq. 17.

    Papers and code disagree on x, so both have a name. `normalize: mean`: `x = d_w - d_l`, per token; TRL,
    HALOs and LLaMA-Factory, and according to its authors the paper's own results (TRL #1265). `normalize:
    sum`: `x = h`, as eq. 17 reads; rlhf-book, eric-mitchell/DPO and OpenRLHF.

    When: few or clean labels, and dpo runs away.
    Values: beta 0.1; the target is 5 nats, per token under `mean`: out of reach, so the loss is nearly linear
    and 0.01-0.1 act mostly through the learning rate. Under `sum` it is within reach and often exceeded by chance,
    and training hardly moves (docs/losses.md).
    """

    name: Literal["ipo"] = "ipo"
    normalize: Literal["mean", "sum"] = "mean"

    @property
    def divides_by_length(self) -> bool:
        """The variant decides."""
        return self.normalize == "mean"

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """Squared distance of the margin from its target."""
        return (margins - 1 / (2 * self.beta)).square()


class Hinge(MarginLoss):
    """Pushes a pair until its margin reaches 1 / beta, then leaves it alone.

    The loss of SLiC with log-ratios in place of log-probs, which is how RSO uses it.

    Formula: `max(0, 1 - beta h)`. Papers: RSO, arXiv 2309.06657, table 1 (`hinge-norm`); SLiC-HF, arXiv
    2305.10425.

    When: pairs beyond doubt should stop costing capacity.
    Values: beta 0.05 (RSO). The learning rate is dpo's: the papers' are for T5.
    """

    name: Literal["hinge"] = "hinge"
    beta: PositiveFloat = 0.05

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """Zero beyond the margin."""
        return torch.relu(1 - self.beta * margins)


class EXO(MarginLoss):
    """Fits the policy to the preference with the reverse KL, the direction reinforcement learning uses.

    DPO covers every mode of the preference distribution; this one seeks the best of them.

    Formula: `s(z) [log s(z) - log(1 - eps)] + s(-z) [log s(-z) - log eps]`, z = beta h, eps =
    `label_smoothing` > 0. Paper: arXiv 2402.00856, eq. 16.

    When: the data came from the reference itself and holds one good answer among many poor ones. exo_rw is the
    same for scored lists.
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
    """DPO whose reward grows like the ratio itself, not its logarithm, once the policy exceeds the reference.

    It is the solution for a chi-squared divergence added to the KL: what the reference hardly ever says becomes
    expensive to favour, which keeps the policy where the data is.

    Formula: `-log s(beta (phi_w - phi_l))`, `phi = e^D + D`, the derivative of `(u - 1)^2 / 2 + u log u` at u = e^D.
    Paper: chi-squared preference optimization, arXiv 2407.13399, algorithm 1. The paper bounds the difference at
    twice the largest reward, where the slope is 0; here e^D goes on along its tangent beyond D = 20 instead.

    When: dpo overfits: long training, or a small beta. Completions far below the reference train as in dpo.
    Values: beta and learning rate are dpo's; at the reference the slope is twice dpo's.
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
    """A loss that a language model found: logistic for pairs in the wrong order, exponential for the others.

    A gate at the scale of tau blends the two; the blend is not convex just above zero.

    Formula: `(1 - m) (-log s(z)) + m e^-z`, z = beta h, m = s(z / tau). Paper: arXiv 2406.08414, eq. 5.

    When: as an alternative to dpo on clean labels; the paper finds gains on chat and summaries.
    Values: beta 0.05, tau 0.05, learning rate 5e-7, batch 64 (appendices B.1 and E).
    """

    name: Literal["discopop"] = "discopop"
    learning_rate: ClassVar[float] = 5e-7
    beta: PositiveFloat = 0.05
    tau: Annotated[float, Field(gt=0, le=1)] = 0.05

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """The gated blend; `m e^-z` is one exponential, so that neither factor overflows alone."""
        z = self.beta * margins
        logistic = torch.sigmoid(-z / self.tau) * -logsigmoid(z)
        exponential = torch.exp(logsigmoid(z / self.tau) - z)
        return logistic + exponential
