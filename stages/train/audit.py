"""The audit at step 0: log-probs of real rows are those of the rows alone, and those that are cached.

The second is checked if the policy starts as the reference. A wrong model, template or dtype, a changed value in the
store, or an architecture that packs do not reproduce stops the run here, with the row and the token.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cache.errors import CorruptError
from cache.ref_logps import RefLogps
from stages.data.rows import RowSet
from stages.engine.pack_check import TOLERANCES, checked_logps, longest_example

if TYPE_CHECKING:
    from stages.engine.scorer import Scorer

NUM_EXAMPLES = 8


class Audit(NamedTuple):
    """Largest differences found, in nats a token: packed against alone, live against cached (None: not compared)."""

    packing: float
    reference: float | None


def audit(scorer: "Scorer", rows: RowSet, reference: RefLogps | None) -> Audit:
    """Score a few examples, that with the longest row among them; raises an `AlignError` beyond tolerance."""
    packing, cached = 0.0, 0.0
    for example in _examples(rows):
        logps, difference = checked_logps(scorer, rows, example)
        packing = max(packing, difference)
        if reference is not None:
            tolerance = TOLERANCES[scorer.compute.dtype]
            for row, live in zip(range(rows.starts[example], rows.ends[example]), logps, strict=True):
                cached = max(cached, _difference(rows, row, live, reference, tolerance))
    return Audit(packing, None if reference is None else cached)


def _examples(rows: RowSet) -> list[int]:
    spread = np.linspace(0, rows.num_examples - 1, min(NUM_EXAMPLES, rows.num_examples)).astype(int)
    return sorted({*spread.tolist(), longest_example(rows)})


def _difference(rows: RowSet, row: int, live: np.ndarray, reference: RefLogps, tolerance: float) -> float:
    cached = reference.get(rows.keys[row])
    if len(cached) != len(live):
        raise CorruptError(
            f"Row {rows.keys[row].hex()} has {len(live)} tokens but {len(cached)} reference log-probs in {reference.folder}."
        )
    differences = np.abs(live - cached)
    token = int(differences.argmax())
    # Not `>`: a cached NaN is within no tolerance. `argmax` names it.
    if not differences[token] <= tolerance:
        raise CorruptError(
            f"Row {rows.keys[row].hex()} ({rows.sources[row]}), completion token {token}: the cached reference "
            f"log-prob is {cached[token]:.6f}, the same model now gives {live[token]:.6f}. The store "
            f"{reference.folder} is not of this model: delete it and run `align cache-ref` again."
        )
    return float(differences[token])
