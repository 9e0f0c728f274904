"""Losses of all completions of a prompt at once, best to worst or by their scores.

In: lists of completions with reference log-probs, from ranked data (`prepare.graded=ranked`, `train.pairs=all`); a
pair is a list of two. Out: one loss per list. A list is never split, so how a step is split changes nothing. D is
the summed log-ratio of a completion, s its score.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stages.losses.contract import Batch, Loss, LossOutput, PositiveFloat, Step


class PlackettLuce(Loss):
    """DPO for rankings: each completion should win against all that are ranked below it.

    Choosing the best of the list, then the best of the rest, and so on, is the Plackett-Luce model; of two it is
    that of Bradley and Terry, and the loss dpo.

    Formula: `sum_k [log sum_(j = k or below k) e^(beta D_j) - beta D_k]`. Paper: DPO, arXiv 2305.18290, appendix A.3.
    Completions of equal scores are not compared with each other, so a list of equal ones has loss 0.

    When: ranked lists, as from several graded samples; it reads their order alone.
    Values: beta and learning rate are dpo's. The loss of a list of N starts at log N!.
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
    """Makes the completions of a prompt as likely, against the reference, as their scores say.

    The scores become a distribution over the list, the policy's rewards another, and the loss is their
    cross-entropy.

    Formula: `-sum_i q_i log softmax(beta D)_i`, `q = softmax(s / alpha)` over the list. Paper: arXiv 2402.05369;
    authors' code, thu-ml/Noise-Contrastive-Alignment, which adds 0.01 to the first score so that it wins ties; here
    ties share. Of two completions it is rpo's backward_kl with eta 1 / alpha, but for a constant, and dpo where one
    label is certain.

    When: several completions with scores on one scale. nca is its relative for pairs.
    Values: beta 0.01, alpha 1e-4 (authors' reward_qlora.yaml, scores up to 10: all weight on the best); batch 32;
    learning rate nca's, 1e-6 (their 5e-6 is for QLoRA).
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
    """exo for lists of scored completions: the reverse KL from the policy's distribution to that of the scores.

    Where infonca spreads over all that scores well, this one seeks the best.

    Formula: `sum_i p_i (log p_i - log q_i)`, `p = softmax(beta D)`, `q = softmax(s / score_beta)` over the list.
    Paper: EXO, arXiv 2402.00856; `exo-rw` in the authors' code (haozheji/exact-optimization), whose beta_pi and
    beta_r these are. Of two completions it is rpo's forward_kl with eta 1 / score_beta, and exo with the label that it implies.

    When: the completions are the reference's own samples, scored by a reward model.
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
    """Regresses each log-ratio to the one that the optimal policy has for a completion of this rank.

    A reward's quantile among the reference's own samples is uniform, so the partition function of the optimal
    policy is known, and a single completion has a target of its own.

    Formula: the mean over the list of `(q - beta log Z - beta D)^2`, q the share of the list whose score is at most the
    completion's own, `Z = beta (e^(1/beta) - 1)`. Paper: arXiv 2507.08068, eq. 11, with Z in full; the authors' code
    leaves out its -1, which is nothing at their beta.

    When: several samples of the reference for each prompt, scored; quantiles are as fine as the list is long. For
    samples of another model q is not a quantile of the reference's.
    Values: beta 3e-3 (authors' train-qrpo.yaml; they try 3e-4 to 3e-3), learning rate 1e-7 to 1e-6, batch 128, without
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
