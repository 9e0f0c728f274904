"""One optimizer step's gradient and metrics, and held-out evaluation, independent of how the examples are split.

In: a `RowScorer`, a loss, example numbers, the loss's running state.  Out: metrics, and gradients in `.grad`. A step
is a set of examples. However it is split into packs and ranks, its loss is the sum of the losses of its units divided
by the number of units in the whole step, its statistics (KTO's z, BCO's delta, AOT's ranks) are those of the whole step,
and each metric is a sum divided by a count, reduced once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from stages.losses.contract import CARRY_GRADIENT, Batch, Loss, LossOutput, Rows, Step
from stages.train.step.length_metrics import length_metrics
from stages.train.step.metrics import Totals, ranking_accuracy
from stages.train.step.row_scorer import RowScorer


def accumulate_step(
    scorer: RowScorer, loss: Loss, examples: Sequence[int], state: dict[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Add the gradient of a step to the policy's `.grad`; return its metrics and the loss's next state."""
    groups = [scorer.pairs.scored(example) for example in examples]
    statistics = _step_statistics(scorer, loss, examples, state)
    numbers = np.concatenate(groups)
    units = _num_units(scorer, loss, numbers)
    totals = Totals()
    gradients: dict[str, Tensor] = {}
    if loss.whole_step:
        batch, output, gradients = _whole_step(scorer, loss, groups, statistics)
        state = loss.next_state(output.rewards, state)
        if scorer.world.is_main:
            totals.add_batch(batch, output)
    position = {int(row): index for index, row in enumerate(numbers)}
    with scorer.scorer.weights_cast_once():
        for pack in scorer.packs(groups):
            rows = scorer.score(pack)
            if loss.whole_step:
                objective = _linearized(rows, gradients, [position[int(row)] for row in pack.rows])
            else:
                batch = scorer.batch(pack.rows, rows)
                output = loss(batch, statistics)
                objective = output.losses.sum() / units
                totals.add_batch(batch, output)
            objective.backward()
        for pack in scorer.padding_packs(groups):
            (scorer.scorer(pack).completion_logps.sum() * 0.0).backward()
    metrics = totals.means(scorer.world, scorer.device)
    return {**metrics, **_kl_metric(statistics)}, state


@torch.no_grad()
def evaluate(
    scorer: RowScorer, loss: Loss, examples: Sequence[int], state: dict[str, float]
) -> dict[str, float]:
    """Metrics of the loss on `examples`, taken as one step, and the metrics of length."""
    groups = [scorer.pairs.scored(example) for example in examples]
    statistics = replace(_step_statistics(scorer, loss, examples, state), training=False)
    batch = scorer.batch(np.concatenate(groups), scorer.score_all(groups))
    output = loss(batch, statistics)
    totals = Totals()
    if scorer.world.is_main:
        totals.add_batch(batch, output)
        if not len(batch.chosen):
            totals.add("rewards/accuracies", ranking_accuracy(batch, output))
        for name, values in length_metrics(batch, output).items():
            totals.add(name, values)
    return {**totals.means(scorer.world, scorer.device), **_kl_metric(statistics)}


def _step_statistics(scorer: RowScorer, loss: Loss, examples: Sequence[int], state: dict[str, float]) -> Step:
    kl = _mean_mismatched_logratio(scorer, examples) if "kl" in loss.needs else None
    chosen = np.concatenate([scorer.pairs.of(example)[:, 0] for example in examples])
    tokens = [int(scorer.rows.mask(row).sum()) for row in chosen]
    return Step(kl=kl, tokens_per_pair=float(np.mean(tokens)) if tokens else 1.0, state=state)


def _mean_mismatched_logratio(scorer: RowScorer, examples: Sequence[int]) -> Tensor:
    """Mean log-ratio of the mismatched rows of the examples, a scalar; 0 if there are none."""
    groups = [scorer.rows.example_rows(example, mismatched=True) for example in examples]
    groups = [group for group in groups if len(group)]
    return scorer.score_all(groups).logratios.mean() if groups else torch.zeros((), device=scorer.device)


def _whole_step(
    scorer: RowScorer, loss: Loss, groups: Sequence[np.ndarray], statistics: Step
) -> tuple[Batch, LossOutput, dict[str, Tensor]]:
    """The loss on all rows of the step, and its gradient with respect to each log-prob field of `Rows`, (rows,)."""
    scored = scorer.score_all(groups)
    names = [name for name in CARRY_GRADIENT if name in {"logps"} | loss.needs]
    leaves = {name: scored.get(name).clone().requires_grad_() for name in names}
    batch = scorer.batch(np.concatenate(groups), replace(scored, **leaves))
    output = loss(batch, statistics)
    gradients = torch.autograd.grad(output.losses.mean(), list(leaves.values()), allow_unused=True)
    used = {name: value for name, value in zip(names, gradients, strict=True) if value is not None}
    return batch, output, used


def _linearized(rows: Rows, gradients: Mapping[str, Tensor], places: Sequence[int]) -> Tensor:
    """A scalar with the same gradient as the step's loss: log-probs times the loss's gradients at `places` of the step."""
    # Chain rule: the gradient of the parameters is the sum over rows of (d loss / d log-prob) x (d log-prob / d
    # parameters), which packs can add up in any order.
    products = [(rows.get(name) * gradient[places]).sum() for name, gradient in gradients.items()]
    return torch.stack(products).sum()


def _num_units(scorer: RowScorer, loss: Loss, numbers: np.ndarray) -> int:
    match loss.unit:
        case "pair":
            return len(scorer.pairs.among(numbers))
        case "row":
            return len(numbers)
        case "list":
            return len(np.unique(scorer.rows.example_of(numbers)))


def _kl_metric(statistics: Step) -> dict[str, float]:
    """KTO's reference point as it enters the loss: max(0, estimate)."""
    return {} if statistics.kl is None else {"kl": max(0.0, float(statistics.kl))}
