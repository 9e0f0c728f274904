"""The DPO family: losses that read one number of a pair, the margin between its chosen and its rejected score.

In: a batch of pairs with reference log-probs. Out: one loss per pair. This file holds what the family
shares, the options and the margin; each member turns margins into losses (`pair_losses`).

Symbols in the docstrings: L_w, L_l policy log-probs of the chosen and rejected completion, R_w, R_l the
reference's, n_w, n_l their token counts; D = L - R, d = D / n, h = D_w - D_l; s is the logistic function.
"""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from stages.losses.contract import Batch, Loss, LossOutput, NonNegativeFloat, PositiveFloat, Rows, Step
from stages.losses.numerics import expm1


class MarginLoss(Loss):
    """The options and the margin of the DPO family; not a loss by itself.

    Options of every member, all off by default:

    - `ld_alpha`: length-desensitised log-probs, `sum_{t <= m} + ld_alpha * sum_{t > m}` with
      `m = min(n_w, n_l)`, for policy and reference alike (arXiv 2409.06411, section 3). 1 changes nothing; 0
      ignores the tokens by which one completion is longer. Averages still divide by n, as in TRL.
    - `sft_weight`: adds `sft_weight * NLL_w`, the mean negative log-prob per chosen token of each pair
      (RPO, arXiv 2404.19733, section 2; there the weight is 1). It keeps the chosen log-probs from falling.
    - `f_divergence`: replaces D by f'(ratio), so that the policy is held near the reference by another divergence
      than the reverse KL (f-DPO, arXiv 2309.16240, table 1). forward_kl: `1 - e^-D`; js_divergence: `log 2 +
      log s(D)`; alpha_divergence: `(e^((c - 1) D) - 1) / (c - 1)`, where c is `f_alpha_divergence_coef` in (0,
      1): the limit c = 1 is reverse_kl, c = 0 is forward_kl. TRL's c is 1 - alpha of the paper; at the usual 0.5
      the two agree. Beyond an exponent of 20 both exponentials are continued by their tangent, so that scores, their
      squares and gradients are finite in float32 for any completion, and never 0. TRL clips exponents at 80, where
      squares are infinite (ipo) and gradients 0.
    - weights in the data: the chosen row's weight multiplies the whole loss of its pair.

    The reported rewards are `beta * D` whatever the options, never divided by a length, as in TRL: so the dashboards
    of different losses can be compared.
    """

    always_needs: ClassVar[frozenset[str]] = frozenset({"ref_logps", "weights"})
    # 1e-6: SmolLM2-1.7B in the alignment-handbook; take 5e-7 for 7-9B (Zephyr, Tulu 3, SimPO's baselines).
    learning_rate: ClassVar[float] = 1e-6
    batch_size: ClassVar[int] = 64

    beta: PositiveFloat = 0.1
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    sft_weight: NonNegativeFloat = 0.0
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    f_alpha_divergence_coef: Annotated[float, Field(gt=0, lt=1)] | None = None

    @field_validator("ld_alpha")
    @classmethod
    def _one_changes_nothing(cls, value: float | None) -> float | None:
        return None if value == 1 else value

    @model_validator(mode="after")
    def _coefficient_goes_with_its_divergence(self):
        if self.f_divergence == "alpha_divergence" and self.f_alpha_divergence_coef is None:
            raise ValueError("f_divergence=alpha_divergence needs f_alpha_divergence_coef (0.5 is usual)")
        if self.f_divergence != "alpha_divergence" and self.f_alpha_divergence_coef is not None:
            raise ValueError(
                f"f_alpha_divergence_coef={self.f_alpha_divergence_coef} has no effect with"
                f" f_divergence={self.f_divergence}; set f_divergence=alpha_divergence or leave it out"
            )
        return self

    @property
    def needs(self) -> frozenset[str]:
        """Length-desensitised log-probs are made of the part that both completions cover, and the rest."""
        shared = frozenset() if self.ld_alpha is None else {"shared_logps", "ref_shared_logps"}
        return self.always_needs | shared

    @property
    def divides_by_length(self) -> bool:
        """Whether each completion's score is divided by its number of tokens before the margin is taken."""
        return False

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """The loss of each pair, (pairs,), from its margin: h, or what the options replace h by."""
        raise NotImplementedError

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per pair."""
        chosen, rejected = batch.pairs()
        losses = self.pair_losses(self._scores(chosen) - self._scores(rejected), chosen, rejected)
        metrics = {}
        if self.sft_weight:
            nll = -chosen.mean_logps
            losses = losses + self.sft_weight * nll
            metrics["nll"] = nll.detach()
        if chosen.weights is not None:
            losses = losses * chosen.weights
        return LossOutput(losses, self.beta * batch.rows.logratios.detach(), metrics)

    def _scores(self, rows: Rows) -> Tensor:
        scores = self._divergence_scores(self._logratios(rows))
        return scores / rows.num_tokens if self.divides_by_length else scores

    def _logratios(self, rows: Rows) -> Tensor:
        if self.ld_alpha is None:
            return rows.logratios
        assert rows.shared_logps is not None, "shared_logps is not in the needs of the loss"
        assert rows.ref_shared_logps is not None, "ref_shared_logps is not in the needs of the loss"
        shared = rows.shared_logps - rows.ref_shared_logps
        return shared + self.ld_alpha * (rows.logratios - shared)

    def _divergence_scores(self, logratios: Tensor) -> Tensor:
        match self.f_divergence:
            case "reverse_kl":
                return logratios
            case "forward_kl":
                return -expm1(-logratios)
            case "js_divergence":
                return math.log(2) + logsigmoid(logratios)
            case "alpha_divergence":
                assert self.f_alpha_divergence_coef is not None
                exponent = self.f_alpha_divergence_coef - 1
                return expm1(exponent * logratios) / exponent
