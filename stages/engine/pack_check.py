"""Real rows scored in a pack and each alone: the self-check at load has seen only short rows of random tokens.

In: a scorer, and an example of a row set.  Out: the log-probs, once they are known to be those of the rows alone.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch

from cache.errors import DataError, UsageError
from stages.data.rows import RowSet
from stages.engine.packs import build_pack

if TYPE_CHECKING:
    from stages.engine.scorer import Scorer

# Nats a token. float32 differs by rounding of another batch shape; bfloat16 by up to 0.3 in the field.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.5}


def longest_example(rows: RowSet) -> int:
    """The example with the longest row of a set that has some."""
    longest = int(np.argmax(rows.prompt_lengths + rows.completion_lengths))
    return int(rows.example_of(np.array([longest]))[0])


@torch.no_grad()
def checked_logps(scorer: "Scorer", rows: RowSet, example: int) -> tuple[list[np.ndarray], float]:
    """Log-probs of an example's rows, float32, and how far they are at most from those of the rows alone, in nats.

    Raises `DataError` where one is not finite, and `UsageError` where the two differ by more than rounding.
    """
    group = np.arange(rows.starts[example], rows.ends[example])
    pack = build_pack(rows, [group])
    packed = scorer(pack).completion_logps.cpu().numpy()
    alone = packed
    if scorer.packed or scorer.way.padded:
        with scorer.rows_alone():
            alone = scorer(pack).completion_logps.cpu().numpy()
    ends = np.cumsum(rows.completion_lengths[group])[:-1]
    found = list(zip(group, np.split(packed, ends), np.split(alone, ends), strict=True))
    return [logps for _, logps, _ in found], max(_difference(scorer, rows, *row) for row in found)


def _difference(scorer: "Scorer", rows: RowSet, row: int, packed: np.ndarray, alone: np.ndarray) -> float:
    where = f"Row {rows.keys[row].hex()} ({rows.sources[row]}), completion token "
    model = type(scorer.model).__name__
    not_finite = ~(np.isfinite(packed) & np.isfinite(alone))
    if not_finite.any():
        token = int(not_finite.argmax())
        raise DataError(
            f"{where}{token}: {model} gives it the log-prob {packed[token]}, and alone {alone[token]}. Its weights hold "
            f"NaN or infinity, or a layer overflows: look at the model, or use --set compute.dtype=float32."
        )
    differences = np.abs(packed - alone)
    token = int(differences.argmax())
    if differences[token] > TOLERANCES[scorer.compute.dtype]:
        raise UsageError(
            f"{where}{token}: its log-prob is {packed[token]:.6f} in a pack and {alone[token]:.6f} alone. Packs of rows "
            f"this long do not reproduce {model}: prepare shorter ones with --set prepare.max_length=N, or use another model."
        )
    return float(differences[token])
