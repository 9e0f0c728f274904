"""The audit at step 0: cached reference log-probs against those of the policy, if the policy starts as the reference.

In: a scorer of the untrained policy, rows, the store.  Out: the largest difference, or an error that names the row, the
token and the difference, for example after a wrong model, template or dtype, or a changed value in the store.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch

from cache.errors import CorruptError
from cache.ref_logps import RefLogps
from stages.data.rows import RowSet
from stages.engine.packs import build_pack

if TYPE_CHECKING:
    from stages.engine.scorer import Scorer

NUM_EXAMPLES = 8
# Nats per token. In float32 the shape of a pack changes rounding only; bfloat16 differs by up to 0.3 on real models.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.5}


@torch.no_grad()
def audit(scorer: "Scorer", rows: RowSet, reference: RefLogps) -> float:
    """Largest |policy - reference| over a few examples, in nats per token; raises `CorruptError` above the tolerance."""
    worst = 0.0
    chosen = np.linspace(0, rows.num_examples - 1, min(NUM_EXAMPLES, rows.num_examples)).astype(int)
    for example in np.unique(chosen):
        group = np.arange(rows.starts[example], rows.ends[example])
        token_logps = scorer(build_pack(rows, [group])).completion_logps.cpu().numpy()  # (completion tokens,)
        ends = np.cumsum(rows.completion_lengths[group])
        for row, live in zip(group, np.split(token_logps, ends[:-1]), strict=True):
            cached = reference.get(rows.keys[row])
            if len(cached) != len(live):
                raise CorruptError(
                    f"Row {rows.keys[row].hex()} has {len(live)} tokens but {len(cached)} reference log-probs in {reference.folder}."
                )
            differences = np.abs(live - cached)
            worst = max(worst, float(differences.max()))
            if not worst <= TOLERANCES[scorer.compute.dtype]:
                token = int(differences.argmax())
                raise CorruptError(
                    f"Row {rows.keys[row].hex()} ({rows.sources[row]}), completion token {token}: the cached reference "
                    f"log-prob is {cached[token]:.6f}, and the same model now gives {live[token]:.6f}. The store "
                    f"{reference.folder} is not of this model: delete it and run `align cache-ref` again."
                )
    return worst
