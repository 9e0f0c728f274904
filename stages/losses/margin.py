"""The DPO family: losses of one number per pair, the margin between the chosen and the rejected score.

In: a batch of pairs with reference log-probs. Out: one loss per pair. This file holds what the family
shares (its options and the margin); the members say what they do with the margin (`pair_losses`).

Symbols in the docstrings: L_w, L_l policy log-probs of the chosen and rejected completion, R_w, R_l the
reference's, n_w, n_l their token counts; D = L - R, d = D / n, h = D_w - D_l; s is the logistic function.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from stages.losses.contract import Batch, Loss, LossOutput, NonNegativeFloat, PositiveFloat, Rows, Step

# exp(80) is the last round number whose square root, sums and differences are safe in float32.
_MAX_EXPONENT = 80.0


class MarginLoss(Loss):
    """What the members of the DPO family share; not a loss by itself.

    Options, off by default, that every member understands:

    - `ld_alpha`: length-desensitised log-probs, `sum_{t <= m} + ld_alpha * sum_{t > m}` with
      `m = min(n_w, n_l)`, for policy and reference alike (arXiv 2409.06411, section 3). 1 changes nothing, 0
      ignores what the longer completion says beyond the shorter one. Averages still divide by n, as TRL does.
    - `sft_weight`: adds `sft_weight * NLL_w`, the mean negative log-prob per chosen token of each pair
      (RPO, arXiv 2404.19733, section 2; there the weight is 1). Keeps the chosen log-probs from falling.
    - `f_divergence`: replaces D by f'(ratio), so that another divergence than the reverse KL holds the policy
      near the reference (f-DPO, arXiv 2309.16240, table 1). forward_kl: `1 - e^-D`; js_divergence: `log 2 +
      log s(D)`; alpha_divergence: `(e^((c - 1) D) - 1) / (c - 1)` with c the `f_alpha_divergence_coef` in (0,
      1): c towards 1 is reverse_kl, 0 is forward_kl. TRL's c is 1 - alpha of the paper; at the usual 0.5 they
      agree. Exponents stop at 80, so a hopeless row is infinite nowhere.
    - a weight in the data multiplies the whole loss of its pair (the chosen row's weight counts).

    The reported rewards are `beta * D`, never divided by a length and without these options, as in TRL, so
    that dashboards of different losses compare.
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
        """Whether each score is divided by the number of its tokens before the difference."""
        return False

    def pair_losses(self, margins: Tensor, chosen: Rows, rejected: Rows) -> Tensor:
        """The loss of each pair, from its margin (h, or what the options make of it); shape (pairs,)."""
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
                return -torch.expm1((-logratios).clamp(max=_MAX_EXPONENT))
            case "js_divergence":
                return math.log(2) + logsigmoid(logratios)
            case "alpha_divergence":
                assert self.f_alpha_divergence_coef is not None
                slope = self.f_alpha_divergence_coef - 1
                return torch.expm1((slope * logratios).clamp(max=_MAX_EXPONENT)) / slope
