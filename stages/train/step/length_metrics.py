"""How much of a preference is a preference for length: two metrics of held-out pairs.

`length_bias` is the correlation of a pair's margin with how many tokens its chosen completion is longer;
`accuracies/<tokens>` is the accuracy of pairs by the length of their longer completion. Lengths count the
completion's trained tokens.
"""

from torch import Tensor

from stages.losses.contract import Batch, LossOutput
from stages.train.step.metrics import wins

# The same in every run, so that runs can be compared; tokens of the longer completion, the upper ends included.
BUCKETS = ((1, 64), (65, 256), (257, 1024), (1025, None))
MIN_PAIRS = 3


def length_metrics(batch: Batch, output: LossOutput) -> dict[str, Tensor]:
    """Values to average by metric name: a scalar for the correlation, one a pair for the accuracies.

    Empty buckets are left out, and so is a correlation that is not defined: of fewer than three pairs, or where
    all margins or all length differences are equal, as the margins are at step 0.
    """
    if not len(batch.chosen):
        return {}
    tokens, rewards = batch.rows.num_tokens, output.rewards
    margins = (rewards[batch.chosen] - rewards[batch.rejected]).double()
    longer = (tokens[batch.chosen] - tokens[batch.rejected]).double()
    correct = wins(rewards[batch.chosen], rewards[batch.rejected])
    lengths = tokens[batch.chosen].maximum(tokens[batch.rejected])
    found: dict[str, Tensor] = {}
    for low, high in BUCKETS:
        inside = (lengths >= low) & (lengths <= (high or float("inf")))
        if inside.any():
            found[f"accuracies/{low}-{high or ''}"] = correct[inside]
    if len(margins) >= MIN_PAIRS and margins.std() > 0 and longer.std() > 0:
        centred, other = margins - margins.mean(), longer - longer.mean()
        found["length_bias"] = (centred @ other) / (centred.norm() * other.norm())
    return found
