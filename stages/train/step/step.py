"""One optimizer step's gradient and metrics, and held-out evaluation: independent of the split.

A step is a set of examples. However it is divided into micro-batches and ranks, the loss is a sum
over its units divided by their number in the whole step, statistics (KTO's z, BCO's delta, AOT's
ranks) are taken over the whole step, and metrics are sums over counts, reduced once.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from stages.losses.contract import CARRY_GRADIENT, Batch, Loss, LossOutput, Step
from stages.train.step.length_metrics import length_metrics
from stages.train.step.metrics import Totals, ranking_accuracy
from stages.train.step.row_scorer import RowScorer


def accumulate_step(
    scorer: RowScorer, loss: Loss, examples: Sequence[int], state: dict[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Add the gradient of a step to the policy's `.grad` and return its metrics and the loss's next state."""
    groups = [scorer.pairs.fed(example) for example in examples]
    facts = _facts(scorer, loss, examples, state)
    numbers = np.concatenate(groups)
    units = _num_units(scorer, loss, numbers)
    totals = Totals()
    slopes: dict[str, torch.Tensor] = {}
    if loss.whole_step:
        batch, output, slopes = _whole_step(scorer, loss, groups, facts)
        state = loss.next_state(output.rewards, state)
        if scorer.world.is_main:
            totals.add_batch(batch, output)
    position = {int(row): index for index, row in enumerate(numbers)}
    with scorer.scorer.weights_cast_once():
        for pack in scorer.packs(groups):
            rows = scorer.score(pack)
            if slopes:
                own = [position[int(row)] for row in pack.rows]
                objective = torch.stack(
                    [(rows.get(name) * slope[own]).sum() for name, slope in slopes.items()]
                ).sum()
            else:
                batch = scorer.batch(pack.rows, rows)
                output = loss(batch, facts)
                objective = output.losses.sum() / units
                totals.add_batch(batch, output)
            objective.backward()
        for pack in scorer.company(groups):
            (scorer.scorer(pack).completion_logps.sum() * 0.0).backward()
    metrics = totals.means(scorer.world, scorer.device)
    return {**metrics, **_kl_metric(facts)}, state


@torch.no_grad()
def evaluate(
    scorer: RowScorer, loss: Loss, examples: Sequence[int], state: dict[str, float]
) -> dict[str, float]:
    """Metrics of the loss on fixed examples, taken as one step, and how they depend on length."""
    groups = [scorer.pairs.fed(example) for example in examples]
    facts = _facts(scorer, loss, examples, state)
    batch = scorer.batch(np.concatenate(groups), scorer.score_all(groups))
    output = loss(batch, facts)
    totals = Totals()
    if scorer.world.is_main:
        totals.add_batch(batch, output)
        if not len(batch.chosen):
            totals.add("rewards/accuracies", ranking_accuracy(batch, output))
        for name, values in length_metrics(batch, output).items():
            totals.add(name, values)
    return {**totals.means(scorer.world, scorer.device), **_kl_metric(facts)}


def _facts(scorer: RowScorer, loss: Loss, examples: Sequence[int], state: dict[str, float]) -> Step:
    """What the loss may know of the whole step besides its own units."""
    kl = None
    if "kl" in loss.needs:
        mismatched = [scorer.rows.example_rows(example, mismatched=True) for example in examples]
        mismatched = [group for group in mismatched if len(group)]
        kl = (
            scorer.score_all(mismatched).logratios.mean()
            if mismatched
            else torch.zeros((), device=scorer.device)
        )
    chosen = np.concatenate([scorer.pairs.of(example)[:, 0] for example in examples])
    tokens = [int(scorer.rows.mask(row).sum()) for row in chosen]
    return Step(kl=kl, tokens_per_pair=float(np.mean(tokens)) if tokens else 1.0, state=state)


def _whole_step(
    scorer: RowScorer, loss: Loss, groups: Sequence[np.ndarray], facts: Step
) -> tuple[Batch, LossOutput, dict[str, torch.Tensor]]:
    """The loss on all rows of the step at once, and its slopes with respect to each row's log-probs.

    The gradient of the parameters is then the sum over rows of slope times gradient of the log-prob,
    which micro-batches can add up in any order.
    """
    scored = scorer.score_all(groups)
    names = [name for name in CARRY_GRADIENT if name in {"logps"} | loss.needs]
    leaves = {name: scored.get(name).clone().requires_grad_() for name in names}
    batch = scorer.batch(np.concatenate(groups), replace(scored, **leaves))
    output = loss(batch, facts)
    slopes = torch.autograd.grad(output.losses.mean(), list(leaves.values()), allow_unused=True)
    found = {name: slope for name, slope in zip(names, slopes, strict=True) if slope is not None}
    return batch, output, found


def _num_units(scorer: RowScorer, loss: Loss, numbers: np.ndarray) -> int:
    return len(scorer.pairs.among(numbers)) if loss.unit == "pair" else len(numbers)


def _kl_metric(facts: Step) -> dict[str, float]:
    """KTO's reference point; max(0, estimate), as it enters the loss."""
    return {} if facts.kl is None else {"kl": max(0.0, float(facts.kl))}
