"""Two metrics of held-out pairs that show a preference for length.

In: a batch of pairs and its rewards.  Out: `length_bias`, the correlation of a pair's margin with the difference in
length (chosen minus rejected), and `accuracies/<tokens>`, the accuracy of the pairs whose longer completion has a length
in this range. Lengths count the tokens whose completion mask is 1.
"""

from torch import Tensor

from stages.losses.contract import Batch, LossOutput
from stages.train.step.metrics import wins

# Ranges of lengths in tokens, both ends included; the same in every run, so that runs can be compared.
BUCKETS = ((1, 64), (65, 256), (257, 1024), (1025, None))
MIN_PAIRS = 3


def length_metrics(batch: Batch, output: LossOutput) -> dict[str, Tensor]:
    """Values to average by metric name: a scalar for the correlation, (pairs in the range,) for an accuracy.

    A range without pairs is left out. The correlation is left out if it is not defined: for fewer than three pairs, or
    if all margins or all length differences are equal, as the margins are at step 0.
    """
    if not len(batch.chosen):
        return {}
    tokens, rewards = batch.rows.num_tokens, output.rewards
    margins = (rewards[batch.chosen] - rewards[batch.rejected]).double()  # (pairs,)
    differences = (tokens[batch.chosen] - tokens[batch.rejected]).double()  # (pairs,)
    correct = wins(rewards[batch.chosen], rewards[batch.rejected])
    lengths = tokens[batch.chosen].maximum(tokens[batch.rejected])
    found: dict[str, Tensor] = {}
    for low, high in BUCKETS:
        inside = (lengths >= low) & (lengths <= (high or float("inf")))
        if inside.any():
            found[f"accuracies/{low}-{high or ''}"] = correct[inside]
    if len(margins) >= MIN_PAIRS and margins.std() > 0 and differences.std() > 0:
        centred, other = margins - margins.mean(), differences - differences.mean()
        found["length_bias"] = (centred @ other) / (centred.norm() * other.norm())
    return found
