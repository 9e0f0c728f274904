"""Losses that need no reference model: the policy's own log-probs, mostly per token, are the reward.

In: pairs. Out: one loss per pair. L is a completion's summed log-prob, n its number of tokens, a = L / n, s
the logistic function; NLL_w = -a_w (for orpo also over the prompt). No loss here needs another forward pass than
that of the pair.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from stages.losses.contract import Batch, Loss, LossOutput, NonNegativeFloat, PositiveFloat, Rows, Step
from stages.losses.numerics import expm1, log_odds


class SimPO(Loss):
    """Uses the mean log-prob per token, which generation maximizes too, as the reward, with a target margin.

    No reference keeps the policy in place; only a small learning rate does.

    Formula: `-(1 - eps) log s(z) - eps log s(-z)`, `z = beta (a_w - a_l - gamma_beta_ratio)`, eps =
    `label_smoothing`. Paper: arXiv 2405.14734, eq. 6; the smoothing is the authors' code's.

    `gamma_beta_ratio` is the paper's gamma divided by beta, as in the authors' code and rlhf-book. `simpo_gamma` of
    TRL and LLaMA-Factory is gamma itself; TRL's `loss_type: simpo` also adds an NLL term unless `cpo_alpha` is 0.

    When: scoring with a reference is too expensive, or completions grow longer under dpo.
    Values: batch 128; beta, ratio and learning rate belong together (authors' table): 2.0, 0.5, 6e-7 for
    Llama-3-8B-Base, the defaults here; 2.5, 0.55, 1e-6 for Llama-3-8B-Instruct; 10, 0.5, 8e-7 for Gemma-2-9B; 2.0,
    0.8, 3e-7 and 2.5, 0.1, 5e-7 for Mistral-7B Base and Instruct. They advise tuning the learning rate first.
    """

    name: Literal["simpo"] = "simpo"
    always_needs: ClassVar[frozenset[str]] = frozenset()
    learning_rate: ClassVar[float] = 6e-7
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


class SimPER(Loss):
    """Raises the inverse perplexity of the chosen completion and lowers that of the rejected one.

    The inverse perplexity is bounded, so the gradient of an unlikely completion is small, without a beta or a margin
    to tune.

    Formula: `e^(a_l) - e^(a_w)`. Paper: arXiv 2502.00883; authors' code, tengxiao1/SimPER. At alpha -1 the reward of
    alphapo is the inverse perplexity too, less 1.

    When: there is no budget to tune simpo. EXAONE Deep and EXAONE 4.0 were trained with it. The reported reward is the
    mean log-prob per token, as in the authors' code.
    Values: learning rate 6e-7 (authors' for Llama-3-8B-Base; 1e-6 Llama-3-8B-Instruct, 3e-7 and 5e-7 Mistral-7B Base
    and Instruct), batch 128. The loss lies between -1 and 1, and its slopes are small.
    """

    name: Literal["simper"] = "simper"
    always_needs: ClassVar[frozenset[str]] = frozenset()
    learning_rate: ClassVar[float] = 6e-7
    batch_size: ClassVar[int] = 128

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per pair."""
        mean_logps = batch.rows.mean_logps
        inverse_perplexities = mean_logps.exp()
        losses = inverse_perplexities[batch.rejected] - inverse_perplexities[batch.chosen]
        return LossOutput(losses, mean_logps.detach())


class ORPO(Loss):
    """Supervised learning on the chosen completion, plus an odds ratio against the rejected one, in one stage.

    Starts from a base model, without a supervised stage before it.

    Formula: `NLL_w - beta log s(o_w - o_l)`, `o = log(p / (1 - p)) = a - log(1 - e^a)`. Paper: arXiv
    2403.07691, eq. 6 and 7 (beta is its lambda).

    Implementations disagree about the tokens of the NLL. `nll_span: completion` takes those of the chosen completion,
    as rlhf-book and LLaMA-Factory do; `sequence` also takes those of the prompt from the second on, as TRL does:
    `NLL_w = -(log p(prompt) + L_w) / (prompt tokens + n_w)`. TRL averages the NLL over the tokens of a micro-batch;
    here each pair counts the same.

    The odds of a completion of probability near 1 are not clipped, as in liger and LLaMA-Factory; tunix clips p at
    1 - 1e-7. p = 1, where the odds are infinite, is taken as the nearest number below.

    The metrics are `nll` and `log_odds_ratio` = `o_w - o_l`. TRL logs the latter as `log_odds_chosen`, and its
    `log_odds_ratio` is the log-sigmoid of it.

    When: there is no fine-tuned model to start from. Values: beta 0.1, learning rate 5e-6 to 8e-6 (paper 8e-6;
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
        """With `nll_span: sequence` the log-prob of the prompt."""
        return frozenset({"prompt_logps", "num_prompt_tokens"} if self.nll_span == "sequence" else ())

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per pair."""
        chosen, rejected = batch.pairs()
        nll = self._nll(chosen)
        log_odds_ratio = log_odds(chosen.mean_logps) - log_odds(rejected.mean_logps)
        losses = nll - self.beta * logsigmoid(log_odds_ratio)
        metrics = {"nll": nll.detach(), "log_odds_ratio": log_odds_ratio.detach()}
        return LossOutput(losses, self.beta * batch.rows.mean_logps.detach(), metrics)

    def _nll(self, chosen: Rows) -> Tensor:
        if self.nll_span == "completion":
            return -chosen.mean_logps
        assert chosen.prompt_logps is not None, "prompt_logps is not in the needs of the loss"
        assert chosen.num_prompt_tokens is not None, "num_prompt_tokens is not in the needs of the loss"
        return -(chosen.prompt_logps + chosen.logps) / (chosen.num_prompt_tokens + chosen.num_tokens)


class CPO(Loss):
    """DPO with a uniform reference, plus supervised learning on the chosen completion.

    Formula: `-log s(beta (L_w - L_l)) + cpo_alpha NLL_w`. Paper: arXiv 2401.08417, eq. 3 and the
    behaviour-cloning term after it.

    NLL_w is the mean over the tokens of each pair; TRL averages it over the tokens of a micro-batch, which is the
    same for chosen completions of equal length.

    When: the chosen completions are worth imitating and the rejected ones nearly as good, as in translation, for
    which it was made.
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
    """SimPO with another shape of the reward: alpha sets how fast it grows as a completion becomes likely.

    With a positive alpha, unlikely completions cost more than by their log-prob; the limit alpha = 0 is simpo.

    Formula: `-log s(beta (r_w - r_l) - gamma)`, `r = (1 - p^-alpha) / alpha`, p = e^a. Paper: arXiv
    2501.03884, section 3.

    gamma is that of the paper, not divided by beta as in simpo's `gamma_beta_ratio`. Where `-alpha a` exceeds 20,
    which takes a large alpha or a very unlikely completion, r is continued by its tangent and stays finite.

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
    def _alpha_is_not_0(cls, alpha: float) -> float:
        if alpha == 0:
            raise ValueError("must not be 0; simpo is the loss for alpha 0 (gamma_beta_ratio = gamma / beta)")
        return alpha

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per pair."""
        rewards = self.beta * -expm1(-self.alpha * batch.rows.mean_logps) / self.alpha
        margins = rewards[batch.chosen] - rewards[batch.rejected]
        return LossOutput(-logsigmoid(margins - self.gamma), rewards.detach())


class SFT(Loss):
    """Supervised learning on the chosen completions, every token weighted alike; many recipes start from it.

    Formula: the mean of `-log pi(token)` over all chosen tokens of the step. The loss of one pair is `-L_w`
    divided by the step's mean number of chosen tokens; the mean of this over pairs is the mean over tokens, however
    the step is split.

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
