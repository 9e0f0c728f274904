"""Alignment by optimal transport: whole distributions are compared, rank by rank, instead of pair by pair.

In: all pairs of an optimizer step, with reference log-probs. Out: one loss per rank. Ranks need the whole
step, so these losses are called once for it. The k-th loss belongs to the k-th rank, not to the k-th pair,
which is why they take no weights. Symbols as in `margin.py`.
"""

from typing import ClassVar, Literal

import torch
from torch.nn.functional import logsigmoid

from stages.losses.contract import Batch, Loss, LossOutput, PositiveFloat, Step


class AOT(Loss):
    """Lifts the distribution of margins above the reference's, at every quantile.

    The weakest margin of the policy is held against the weakest of the reference, and so on: the policy
    improves everywhere in distribution, though not on each pair.

    Formula: `-log s(beta d_i)`, `d_i = sort(L_w - L_l)_i - sort(R_w - R_l)_i`. Paper: arXiv 2406.05882,
    section 3, paired variant.

    When: large steps (the ranks are those of the step), noisy pairs.
    Values: beta 0.01 (the paper has no other parameter; TRL adds label smoothing). TRL ranks within a
    micro-batch, so its gradient depends on how a step is split; here it does not.
    """

    name: Literal["aot"] = "aot"
    whole_step: ClassVar[bool] = True
    beta: PositiveFloat = 0.01

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per rank of the margins."""
        chosen, rejected = batch.pairs()
        assert chosen.ref_logps is not None, "ref_logps is not in the needs of the loss"
        assert rejected.ref_logps is not None, "ref_logps is not in the needs of the loss"
        margins = torch.sort(chosen.logps - rejected.logps).values
        ref_margins = torch.sort(chosen.ref_logps - rejected.ref_logps).values
        losses = -logsigmoid(self.beta * (margins - ref_margins))
        return LossOutput(losses, self.beta * batch.rows.logratios.detach())


class AOTUnpaired(Loss):
    """Lifts the distribution of chosen log-ratios above that of rejected ones, at every quantile.

    It does not matter which rejected completion stood beside which chosen one, only that there are as many,
    so it reads pairs.

    Formula: `-log s(beta d_i)`, `d_i = sort(D_w)_i - sort(D_l)_i`. Paper: arXiv 2406.05882, section 3,
    unpaired variant.

    When: as aot, where prompts of the two sides differ in kind.
    Values: beta 0.01.
    """

    name: Literal["aot_unpaired"] = "aot_unpaired"
    whole_step: ClassVar[bool] = True
    beta: PositiveFloat = 0.01

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per rank of the log-ratios."""
        chosen, rejected = batch.pairs()
        differences = torch.sort(chosen.logratios).values - torch.sort(rejected.logratios).values
        losses = -logsigmoid(self.beta * differences)
        return LossOutput(losses, self.beta * batch.rows.logratios.detach())
