"""Token log-probs of many rows, without gradient, in packs of the token budget.

In: a `Scorer`, a row set, and the row numbers of examples. Out: the log-probs of each row's completion.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stages.data.rows import RowSet
from stages.engine.packs import build_pack

if TYPE_CHECKING:
    from stages.engine.scorer import Scorer


def score_groups(
    scorer: "Scorer", rows: RowSet, groups: Sequence[np.ndarray]
) -> tuple[dict[int, np.ndarray], int]:
    """Log-probs (float32, nats, one for each completion token) by row number, and the number of positions computed.

    Each group has the row numbers of one example, int64.
    """
    if not scorer.packed:  # nothing is shared, so rows of like length come together whatever their example
        groups = [np.array([row]) for group in groups for row in group]
    packs = (build_pack(rows, [groups[index] for index in indices]) for indices in scorer.plan(rows, groups))
    # Values stay on the device until all are there, so that a GPU computes while the next pack is built.
    scored = [(one.rows, one.input_ids.shape[1], scorer(one).completion_logps) for one in packs]
    found: dict[int, np.ndarray] = {}
    for numbers, _, token_logps in scored:
        ends = np.cumsum(rows.completion_lengths[numbers])
        found.update(zip(numbers.tolist(), np.split(token_logps.cpu().numpy(), ends[:-1]), strict=True))
    return found, sum(positions for _, positions, _ in scored)
