"""Losses of all completions of a prompt at once, by their ranks or by their scores.

In: ranked lists with reference log-probs (`prepare.graded=ranked`, `train.pairs=all`); a pair is a list of two.
Out: one loss per list. D is the summed log-ratio of a completion, s its score.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stages.losses.contract import Batch, Loss, LossOutput, PositiveFloat, Step


class PlackettLuce(Loss):
    """DPO for rankings: the likelihood of the whole order under a Plackett-Luce model.

    The model draws the best of the list, then the best of the rest, and so on. For two completions it is the
    Bradley-Terry model, and the loss is that of dpo.

    Formula: `sum_k [log sum_(j = k or below k) e^(beta D_j) - beta D_k]`. Paper: DPO, arXiv 2305.18290, appendix A.3.
    Completions of equal scores are not compared with each other, so a list of equal ones has loss 0.

    When: ranked lists whose order is more reliable than their scores.
    Values: beta and learning rate are dpo's. The loss of a list of N completions begins at log N!.
    """

    name: Literal["plackett_luce"] = "plackett_luce"
    unit: ClassVar[Literal["pair", "row", "list"]] = "list"
    beta: PositiveFloat = 0.1

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per list."""
        rewards = self.beta * batch.rows.logratios
        below = rewards[batch.rejected]
        largest = rewards.detach().scatter_reduce(0, batch.chosen, below.detach(), "amax")
        totals = torch.exp(rewards - largest).index_add(
            0, batch.chosen, torch.exp(below - largest[batch.chosen])
        )
        return LossOutput(_list_sums(totals.log() + largest - rewards, batch), rewards.detach())


class InfoNCA(Loss):
    """Cross-entropy between a softmax of the scores and a softmax of the rewards of a list.

    So the policy makes each completion as likely, relative to the reference, as its score says.

    Formula: `-sum_i q_i log softmax(beta D)_i`, `q = softmax(s / alpha)` over the list. Paper: arXiv 2402.05369;
    authors' code, thu-ml/Noise-Contrastive-Alignment, which adds 0.01 to the first score to break ties; here ties
    share the weight. For two completions it is rpo's backward_kl with eta 1 / alpha, up to a constant, and dpo if alpha
    is small.

    When: several completions with scores on one scale. nca is for pairs.
    Values: beta 0.01, alpha 1e-4 (authors' reward_qlora.yaml; with scores of 1 to 10 the best has all the weight),
    batch 32; learning rate nca's, 1e-6 (their 5e-6 is for QLoRA).
    """

    name: Literal["infonca"] = "infonca"
    unit: ClassVar[Literal["pair", "row", "list"]] = "list"
    always_needs: ClassVar[frozenset[str]] = frozenset({"ref_logps", "scores"})
    learning_rate: ClassVar[float] = 1e-6
    batch_size: ClassVar[int] = 32
    beta: PositiveFloat = 0.01
    alpha: PositiveFloat = 1e-4

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per list."""
        rewards = self.beta * batch.rows.logratios
        labels = _log_softmax(_scores(batch) / self.alpha, batch).exp()
        return LossOutput(_list_sums(-labels * _log_softmax(rewards, batch), batch), rewards.detach())


class EXORw(Loss):
    """EXO for ranked lists: the KL from a softmax of the rewards to a softmax of the scores.

    This direction of the KL concentrates on the best completions, that of infonca covers all good ones.

    Formula: `sum_i p_i (log p_i - log q_i)`, `p = softmax(beta D)`, `q = softmax(s / score_beta)` over the list.
    Paper: EXO, arXiv 2402.00856; `exo-rw` in the authors' code (haozheji/exact-optimization), whose beta_pi and
    beta_r these are. For two completions it is rpo's forward_kl with eta 1 / score_beta.

    When: the completions are samples of the reference, scored by a reward model.
    Values: beta 0.5, score_beta 0.5 on HH and TL;DR, 0.1 both on IMDB; learning rate 1e-6, batch 64 (authors' code).
    """

    name: Literal["exo_rw"] = "exo_rw"
    unit: ClassVar[Literal["pair", "row", "list"]] = "list"
    always_needs: ClassVar[frozenset[str]] = frozenset({"ref_logps", "scores"})
    beta: PositiveFloat = 0.5
    score_beta: PositiveFloat = 0.5

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per list."""
        rewards = self.beta * batch.rows.logratios
        log_policy = _log_softmax(rewards, batch)
        log_labels = _log_softmax(_scores(batch) / self.score_beta, batch)
        return LossOutput(_list_sums(log_policy.exp() * (log_policy - log_labels), batch), rewards.detach())


class QRPO(Loss):
    """Regresses each log-ratio to its value under the optimal policy, from the quantile of the reward.

    Quantiles of rewards among samples of the reference are uniform, so the partition function of the optimal policy is
    known, and each completion has a target of its own.

    Formula: the mean over the list of `(q - beta log Z - beta D)^2`, where q is the share of the list with a score of at
    most the completion's own, and `Z = beta (e^(1/beta) - 1)`. Paper: arXiv 2507.08068, eq. 11; the authors' code leaves
    out the -1 of Z, which is below float32's resolution at their beta.

    When: the list holds samples of the reference, with scores; the longer it is, the finer the quantiles. With
    completions of another model q is not a quantile among samples of the reference.
    Values: beta 3e-3 (authors' train-qrpo.yaml; they try 3e-4 to 3e-3), learning rate 1e-7 to 1e-6, batch 128, no
    gradient clipping.
    """

    name: Literal["qrpo"] = "qrpo"
    unit: ClassVar[Literal["pair", "row", "list"]] = "list"
    learning_rate: ClassVar[float] = 3e-7
    batch_size: ClassVar[int] = 128
    beta: PositiveFloat = 3e-3

    def __call__(self, batch: Batch, step: Step) -> LossOutput:
        """One loss per list."""
        rewards = self.beta * batch.rows.logratios
        ones = torch.ones_like(rewards)
        length = _list_sums(ones, batch)[batch.lists]
        better = torch.zeros_like(rewards).index_add(0, batch.rejected, ones[batch.rejected])
        residuals = 1 - better / length - self._beta_log_z() - rewards
        return LossOutput(_list_sums(residuals.square() / length, batch), rewards.detach())

    def _beta_log_z(self) -> float:
        return 1 + self.beta * (math.log(self.beta) + math.log1p(-math.exp(-1 / self.beta)))


def _scores(batch: Batch) -> Tensor:
    assert batch.rows.scores is not None, "scores is not in the needs of the loss"
    return batch.rows.scores


def _list_sums(values: Tensor, batch: Batch) -> Tensor:
    """Sum over each list: (rows,) -> (lists,)."""
    return values.new_zeros(batch.num_lists).index_add(0, batch.lists, values)


def _log_softmax(values: Tensor, batch: Batch) -> Tensor:
    """Log-softmax over each list: (rows,) -> (rows,)."""
    largest = values.new_full((batch.num_lists,), -math.inf)
    largest = largest.scatter_reduce(0, batch.lists, values.detach(), "amax")
    shifted = values - largest[batch.lists]
    return shifted - _list_sums(shifted.exp(), batch).log()[batch.lists]
