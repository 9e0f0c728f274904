"""Losses that need no reference model: the policy's own (mostly per-token) log-probs are the reward.

In: pairs. Out: one loss per pair. L is a completion's summed log-prob, n its number of tokens, a = L / n, s
the logistic function; NLL_w = -a_w (or orpo's, over the prompt as well), so no loss here needs a forward
beyond the pair's.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from stages.losses.contract import Batch, Loss, LossOutput, NonNegativeFloat, PositiveFloat, Rows, Step

# Log-odds need p < 1: the nearest mean log-prob to 0 whose odds float32 still tells apart well.
_MAX_MEAN_LOGP = -1e-6


class SimPO(Loss):
    """Ranks completions by what generation ranks them by, the mean log-prob, and asks for a margin.

    No reference holds the policy, so the learning rate and the margin do.

    Formula: `-(1 - eps) log s(z) - eps log s(-z)`, `z = beta (a_w - a_l - gamma_beta_ratio)`, eps =
    `label_smoothing`. Paper: arXiv 2405.14734, eq. 6; the smoothing is the authors' code's.

    `gamma_beta_ratio` is the paper's gamma divided by beta, as in the authors' code and rlhf-book. TRL's and
    LLaMA-Factory's `simpo_gamma` is gamma itself; TRL's `loss_type: simpo` also adds an NLL term unless
    `cpo_alpha` is 0.

    When: no reference pass is affordable, or dpo makes answers longer.
    Values: beta 2-10, ratio 0.1-0.8, learning rate 3e-7 to 1e-6, batch 128 (authors' table; 2.0 and 0.5 are
    theirs for Llama-3-8B-Base). They advise to tune the learning rate first, then the ratio, then beta.
    """

    name: Literal["simpo"] = "simpo"
    always_needs: ClassVar[frozenset[str]] = frozenset()
    learning_rate: ClassVar[float] = 1e-6
    batch_size: ClassVar[int] = 128
    beta: PositiveFloat = 2.0
    gamma_beta_ratio: NonNegativeFloat = 0.5
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per pair."""
        chosen, rejected = batch.pairs()
        z = self.beta * (chosen.mean_logps - rejected.mean_logps - self.gamma_beta_ratio)
        losses = -(1 - self.label_smoothing) * logsigmoid(z) - self.label_smoothing * logsigmoid(-z)
        return LossOutput(losses, self.beta * batch.rows.mean_logps.detach())


class ORPO(Loss):
    """Fine-tunes on the chosen completions and, with a small weight, lowers the odds of the rejected ones.

    Supervised learning and preference in one stage, starting from a base model.

    Formula: `NLL_w - beta log s(o_w - o_l)`, `o = log(p / (1 - p)) = a - log(1 - e^a)`. Paper: arXiv
    2403.07691, eq. 6 and 7 (beta is its lambda).

    Implementations disagree on the NLL's tokens. `nll_span: completion` takes the chosen completion's, as the
    ancestor rlhf-book and LLaMA-Factory do; `sequence` takes the prompt's too, from its second token on, as
    TRL does: `NLL_w = -(log p(prompt) + L_w) / (prompt tokens + n_w)`. TRL averages the
    NLL over the tokens of a micro-batch, here each pair counts the same.

    The metrics are `nll` and `log_odds_ratio` = `o_w - o_l` (TRL logs this as `log_odds_chosen`, and its
    `log_odds_ratio` is the log-sigmoid of it).

    When: no fine-tuned model to start from. Values: beta 0.1, learning rate 5e-6 to 8e-6 (paper 8e-6;
    Zephyr-141B-ORPO 0.05 and 5e-6), batch 64.
    """

    name: Literal["orpo"] = "orpo"
    always_needs: ClassVar[frozenset[str]] = frozenset()
    learning_rate: ClassVar[float] = 5e-6
    batch_size: ClassVar[int] = 64
    beta: PositiveFloat = 0.1
    nll_span: Literal["completion", "sequence"] = "completion"

    @property
    def needs(self) -> frozenset[str]:
        """The NLL of the sequence begins with the prompt."""
        return frozenset({"prompt_logps", "num_prompt_tokens"} if self.nll_span == "sequence" else ())

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per pair."""
        chosen, rejected = batch.pairs()
        nll = self._nll(chosen)
        log_odds_ratio = _log_odds(chosen.mean_logps) - _log_odds(rejected.mean_logps)
        losses = nll - self.beta * logsigmoid(log_odds_ratio)
        metrics = {"nll": nll.detach(), "log_odds_ratio": log_odds_ratio.detach()}
        return LossOutput(losses, self.beta * batch.rows.mean_logps.detach(), metrics)

    def _nll(self, chosen: Rows) -> Tensor:
        if self.nll_span == "completion":
            return -chosen.mean_logps
        assert chosen.prompt_logps is not None, "prompt_logps is not in the needs of the loss"
        assert chosen.num_prompt_tokens is not None, "num_prompt_tokens is not in the needs of the loss"
        return -(chosen.prompt_logps + chosen.logps) / (chosen.num_prompt_tokens + chosen.num_tokens)


def _log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 - p)) for log p, exact near both ends."""
    logps = mean_logps.clamp(max=_MAX_MEAN_LOGP)
    return logps - torch.log(-torch.expm1(logps))


class CPO(Loss):
    """DPO with a uniform reference, and supervised learning on the chosen completion to hold the policy.

    Formula: `-log s(beta (L_w - L_l)) + cpo_alpha NLL_w`. Paper: arXiv 2401.08417, eq. 3 and the
    behaviour-cloning term after it.

    NLL_w is each pair's mean per token; TRL averages it over the tokens of a micro-batch, which is the same
    when the chosen completions are of equal length.

    When: translation, where it comes from: chosen completions worth imitating, rejected ones that are near
    misses.
    Values: beta 0.1, cpo_alpha 1, learning rate 1e-6 (TRL's defaults).
    """

    name: Literal["cpo"] = "cpo"
    always_needs: ClassVar[frozenset[str]] = frozenset()
    learning_rate: ClassVar[float] = 1e-6
    beta: PositiveFloat = 0.1
    cpo_alpha: NonNegativeFloat = 1.0

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per pair."""
        chosen, rejected = batch.pairs()
        nll = -chosen.mean_logps
        losses = -logsigmoid(self.beta * (chosen.logps - rejected.logps)) + self.cpo_alpha * nll
        return LossOutput(losses, self.beta * batch.rows.logps.detach(), {"nll": nll.detach()})


class AlphaPO(Loss):
    """simpo with a bent reward: alpha says how fast the reward grows as a completion becomes likely.

    Positive alpha makes unlikely completions cost more than the logarithm does; alpha towards 0 is simpo.

    Formula: `-log s(beta (r_w - r_l) - gamma)`, `r = (1 - p^-alpha) / alpha`, p = e^a. Paper: arXiv
    2501.03884, section 3.

    gamma is the paper's, not divided by beta as simpo's `gamma_beta_ratio` is.

    When: simpo lowers the chosen log-probs too far, or overfits.
    Values: alpha 0.25, beta 2.5, gamma 0.1, learning rate 7e-7 (paper, table 3, Mistral-Instruct), batch 128
    as simpo.
    """

    name: Literal["alphapo"] = "alphapo"
    always_needs: ClassVar[frozenset[str]] = frozenset()
    learning_rate: ClassVar[float] = 7e-7
    batch_size: ClassVar[int] = 128
    beta: PositiveFloat = 2.5
    alpha: float = 0.25
    gamma: NonNegativeFloat = 0.1

    @field_validator("alpha")
    @classmethod
    def _alpha_bends(cls, alpha: float) -> float:
        if alpha == 0:
            raise ValueError("must not be 0; simpo is the loss for alpha 0 (gamma_beta_ratio = gamma / beta)")
        return alpha

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per pair."""
        rewards = self.beta * -torch.expm1(-self.alpha * batch.rows.mean_logps) / self.alpha
        margins = rewards[batch.chosen] - rewards[batch.rejected]
        return LossOutput(-logsigmoid(margins - self.gamma), rewards.detach())


class SFT(Loss):
    """Imitates the chosen completions, every token alike; the warm-up that recipes start from.

    Formula: the mean over all chosen tokens of the step of `-log pi(token)`; the loss of one pair is `-L_w`
    divided by the step's mean number of chosen tokens, so that the mean over pairs is that mean, however the
    step is split.

    When: before any other loss, if the policy has not seen the format; or as a part of a mixture. The
    reported reward is the mean log-prob per token.
    Values: learning rate 1e-5 (Tulu 3 8B 5e-6, Zephyr-7B 2e-5), batch 128 (Tulu 3).
    """

    name: Literal["sft"] = "sft"
    always_needs: ClassVar[frozenset[str]] = frozenset()
    learning_rate: ClassVar[float] = 1e-5
    batch_size: ClassVar[int] = 128

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per pair."""
        losses = -batch.rows.logps[batch.chosen] / step.tokens_per_pair
        return LossOutput(losses, batch.rows.mean_logps.detach(), {"nll": losses.detach()})
